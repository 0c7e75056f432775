"""Rollouts: what the reward model sees, seeds by place, and bad samples that are dropped whole or stop the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pytest

from ppod import InvalidArgument, NonFiniteOutput, PpodError, Unavailable
from ppod.client import ModelState
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.collector import RolloutCollector
from ppod_trainer.evaluation import distinct_2, standard_error
from ppod_trainer.metrics import StepTimer
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn, keep_fresh, sample_seed


def rollout(index: int, *, truncated: bool = False, version: int = 1) -> Rollout:
    prompt = Prompt(index, np.array([index, index], dtype=np.int32))
    tokens, logprobs = np.array([7, 8, 2], dtype=np.int32), np.zeros(3, dtype=np.float32)
    turn = Turn(tokens, logprobs, np.full(3, version), truncated=truncated, hides_stop_token=not truncated)
    return Rollout.of_turn(prompt, turn, 50 + index)


def updates_at(*first_versions: int) -> PolicyVersions:
    versions = PolicyVersions()
    for version in first_versions:
        versions.updated(version)
    return versions


def test_rewards_read_all_but_a_stop_token_that_is_hidden() -> None:
    assert rollout(4).visible_tokens.tolist() == [4, 4, 7, 8]
    assert rollout(4, truncated=True).visible_tokens.tolist() == [4, 4, 7, 8, 2]
    assert rollout(4).tokens.tolist() == [4, 4, 7, 8, 2]


def test_samples_over_the_bound_are_dropped_and_counted() -> None:
    scored = [ScoredRollout(rollout(i, version=version), 0.0, np.zeros(3)) for i, version in enumerate((7, 5, 6, 4, 7))]
    versions = updates_at(5, 6, 7)
    fresh, stale = keep_fresh(scored, versions, 1)
    assert [one.rollout.versions[0] for one in fresh] == [7, 6, 7]
    assert stale == 2
    assert keep_fresh(scored, versions, 3) == (scored, 0)
    # One old token makes a sample old.
    mixed = replace(scored[0].rollout, versions=np.array([7, 4, 7]))
    assert keep_fresh([replace(scored[0], rollout=mixed)], versions, 2) == ([], 1)


def test_age_is_counted_in_updates_and_not_in_version_numbers() -> None:
    """Versions 6 and 7 are one policy, pushed again; 9 is an adapter's base, and 10 the same policy as version 8."""
    versions = updates_at(4, 5, 6, 8)
    versions.base(9)
    ages = versions.ages(np.array([[3, 4, 5], [6, 7, 8], [10, 11, 12]]))
    assert ages.tolist() == [[4, 3, 2], [1, 1, 0], [0, 0, 0]]
    bare = ScoredRollout(rollout(0, version=9), 0.0, np.zeros(3))
    assert keep_fresh([bare], versions, 1000) == ([], 1)


def test_seeds_depend_on_place_alone_and_differ() -> None:
    seeds = {
        sample_seed(run, stream, step, index)
        for run in (0, 1)
        for stream in "ab"
        for step in (0, 1)
        for index in (0, 1)
    }
    assert len(seeds) == 16
    assert sample_seed(3, "rollout", 2, 1) == sample_seed(3, "rollout", 2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


_STATE = ModelState("scripted", 0, "")


@dataclass
class Values:
    values: Any
    breakdown: None = None
    state: ModelState = _STATE


@dataclass
class Scripted:
    """Answers as the reward and reference clients do, and refuses the sequences whose first token is in `bad`."""

    bad: dict[int, PpodError] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    def _check(self, sequences: Sequence[np.ndarray]) -> None:
        self.calls.append(len(sequences))
        for sample, sequence in enumerate(sequences):
            if (error := self.bad.get(int(sequence[0]))) is not None:
                error.sample = sample  # pyright: ignore[reportAttributeAccessIssue]
                raise error

    def score(self, sequences: Sequence[np.ndarray], **_: object) -> Values:
        self._check(sequences)
        return Values(np.array([float(sequence[0]) for sequence in sequences]))

    def logprobs(self, sequences: Sequence[np.ndarray], prompts: Sequence[int], **_: object) -> Values:
        self._check(sequences)
        return Values([np.full(len(s) - p, s[0], dtype=np.float32) for s, p in zip(sequences, prompts, strict=True)])


def collector(reward: Scripted, reference: Scripted, mode: Literal["stop", "skip"]) -> RolloutCollector:
    return RolloutCollector(None, reward, reference, BadSamples(mode))  # pyright: ignore[reportArgumentType]


def test_a_bad_sample_is_dropped_from_both_answers(caplog: pytest.LogCaptureFixture) -> None:
    reward = Scripted({2: NonFiniteOutput("score", 0, "nan")})
    reference = Scripted({4: InvalidArgument("tokens", "x", "y", 0)})
    scored = collector(reward, reference, "skip").score([rollout(i) for i in range(6)], StepTimer())
    assert [one.rollout.prompt.index for one in scored] == [0, 1, 3, 5]
    assert all(one.score == one.ref_logprobs[0] == one.rollout.prompt.index for one in scored)
    assert len(caplog.records) == 2
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert {record.getMessage().rpartition("; ")[2] for record in caplog.records} == {
        "sample 2 has prompt 2",
        "sample 4 has prompt 4",
    }
    assert reward.calls == reference.calls == [6, 5]


def test_a_bad_sample_stops_the_run_when_told_so() -> None:
    reward = Scripted({2: NonFiniteOutput("score", 0, "nan")})
    with pytest.raises(NonFiniteOutput, match="sample 2") as caught:
        collector(reward, Scripted(), "stop").score([rollout(i) for i in (5, 6, 2, 3)], StepTimer())
    assert caught.value.__notes__ == ["sample 2 has prompt 2", "rollout.on_bad_sample: skip would leave it out"]


def test_each_sample_goes_with_its_prompts_answer() -> None:
    """Also where another was dropped; a reward that compares with none is sent none."""
    sent: list[object] = []

    class Comparing(Scripted):
        def score(self, sequences: Sequence[np.ndarray], *, references: object = None, **_: object) -> Values:
            sent.append(references)
            return super().score(sequences)

    samples = [rollout(i) for i in range(3)]
    answered = [replace(one, prompt=replace(one.prompt, reference=f"answer {i}")) for i, one in enumerate(samples)]
    reward = Comparing({1: NonFiniteOutput("score", 0, "nan")})
    collector(reward, Scripted(), "skip").score(answered, StepTimer())
    collector(Comparing(), Scripted(), "stop").score(samples, StepTimer())
    assert sent == [("answer 0", "answer 1", "answer 2"), ("answer 0", "answer 2"), ()]


def test_a_reward_that_was_replaced_in_the_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    versions = [3, 3, 4, 4, 3]

    class Replaced(Scripted):
        def score(self, sequences: Sequence[np.ndarray], **_: object) -> Values:
            return replace(super().score(sequences), state=ModelState("helpful", versions.pop(0), "f"))

    asked = collector(Replaced(), Scripted(), "stop")
    told: list[list[str]] = []
    while versions:
        caplog.clear()
        asked.score([rollout(1)], StepTimer())
        told.append([record.getMessage() for record in caplog.records])
    expected = (
        "the reward helpful was replaced: scores are by version {} now, and were by version {}; those from before"
    )
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 1]
    assert told[2][0].startswith(expected.format(4, 3))
    assert told[4][0].startswith(expected.format(3, 4))


def test_an_error_without_a_sample_always_stops() -> None:
    class Gone(Scripted):
        def score(self, sequences: Sequence[np.ndarray], **_: object) -> Values:
            raise Unavailable(f"gone, with {len(sequences)} sequences")

    with pytest.raises(Unavailable):
        collector(Gone(), Scripted(), "skip").score([rollout(i) for i in range(4)], StepTimer())


def test_figures_by_hand() -> None:
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)
    assert distinct_2(["a", ""]) == 0.0
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(np.array([1.0])) == 0.0
