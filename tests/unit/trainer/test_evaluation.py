"""Figures of held-out prompts, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ppod.client import ModelState
from ppod_trainer.evaluation import Evaluator, load_evaluation, write_samples
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, sample_seed

WORDS = {1: "a", 2: "b", 3: "c"}


def decode(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[int(token)] for token in tokens)


def episode(prompt: Prompt, seed: int, score: float) -> ScoredRollout:
    """Two turns of two tokens and of one, which pay 0 and 0.5, and an environment's token between them."""
    rollout = Rollout(
        prompt=prompt,
        response=np.array([1, 2, 3, 1], np.int32),
        action_mask=np.array([True, True, False, True]),
        sampler_logprobs=np.array([-1.0, -2.0, 0.0, -3.0], np.float32),
        versions=np.array([5, 5, 0, 5]),
        turns=np.array([0, 0, -1, 1]),
        rewards=np.array([0.0, 0.0, 0.0, 0.5], np.float32),
        truncated=False,
        hides_stop_token=False,
        seed=seed,
    )
    # The reference says something of the environment's token, too: that is no part of the KL.
    return ScoredRollout(rollout, score, np.array([-1.5, -2.0, -9.0, -4.0], np.float32))


def response(prompt: Prompt, seed: int, score: float) -> ScoredRollout:
    """One token that the reference finds likelier than the sampler does."""
    one = np.ones(1)
    rollout = Rollout(
        prompt=prompt,
        response=np.array([2], np.int32),
        action_mask=one.astype(np.bool_),
        sampler_logprobs=-one.astype(np.float32),
        versions=one.astype(np.int64),
        turns=np.zeros(1, np.int64),
        rewards=np.zeros(1, np.float32),
        truncated=True,
        hides_stop_token=False,
        seed=seed,
    )
    return ScoredRollout(rollout, score, np.array([-0.5], np.float32))


class Collector:
    """Answers two prompts; remembers the seeds and versions that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def collect(self, prompts: Sequence[Prompt], seeds: Sequence[int], version: int, _: object) -> list[ScoredRollout]:
        self.asked.append(([*seeds], version))
        return [episode(prompts[0], seeds[0], 1.0), response(prompts[1], seeds[1], 0.5)]


class Judge:
    """Scores of 3 and 7."""

    def score(self, sequences: Sequence[object], **_: object) -> object:
        assert len(sequences) == 2
        return SimpleNamespace(values=np.array([3.0, 7.0], np.float32), state=ModelState("judge", 0, ""))


def test_an_evaluation_by_hand(tmp_path: Path) -> None:
    prompts = [Prompt(4, np.array([3], np.int32)), Prompt(9, np.array([1, 3], np.int32))]
    collector = Collector()
    evaluation = Evaluator(cast(Any, collector), cast(Any, Judge()), prompts, decode).evaluate(12, 5)
    # Outcomes of 1.5, the environment's pay included, and 0.5; KL of 0.5 + 0 + 1 and of -0.5; 3 and 1 sampled tokens;
    # word pairs "a b", "b c", "c a".
    assert evaluation.record() == {
        "heldout/score": 1.0,
        "heldout/score_standard_error": pytest.approx(0.5),
        "heldout/score_std": pytest.approx(0.5**0.5),
        "heldout/judge": 5.0,
        "heldout/judge_standard_error": pytest.approx(2.0),
        "heldout/kl": 0.5,
        "heldout/length": 2.0,
        "heldout/distinct_2": 1.0,
    }
    # Every evaluation, of whichever run, draws the same samples.
    seeds = [sample_seed(7, "heldout", 0, index) for index in range(2)]
    assert collector.asked == [(seeds, 5)]
    samples = [
        {"prompt": "c", "continuation": " a b c a", "score": 1.5, "judge": 3.0, "tokens": 3, "seed": seeds[0]},
        {"prompt": "a c", "continuation": " b", "score": 0.5, "judge": 7.0, "tokens": 1, "seed": seeds[1]},
    ]
    write_samples(tmp_path / "samples" / "step.jsonl", evaluation)
    lines = (tmp_path / "samples" / "step.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 12, **sample} for sample in samples]
    (tmp_path / "kept.json").write_text(json.dumps(asdict(evaluation)))
    assert load_evaluation(tmp_path / "kept.json") == evaluation


def test_one_sample_has_no_spread_and_no_judge_no_figures() -> None:
    class One(Collector):
        def collect(self, prompts: Sequence[Prompt], seeds: Sequence[int], *_: object) -> list[ScoredRollout]:
            return [response(prompts[0], seeds[0], 2.0)]

    found = Evaluator(cast(Any, One()), None, [Prompt(0, np.array([1], np.int32))], decode).evaluate(0, 1).record()
    assert found == {
        "heldout/score": 2.0,
        "heldout/score_standard_error": 0.0,
        "heldout/score_std": 0.0,
        "heldout/kl": -0.5,
        "heldout/length": 1.0,
        "heldout/distinct_2": 0.0,
    }
