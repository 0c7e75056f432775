"""A judge that refuses a sample, over gRPC: it stops the run, or the others are judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf.message import Message

from ppod import RewardClient
from ppod.errors import NonFiniteOutput
from ppod.tensors import unpack_sequences
from ppod.v1 import reward_pb2
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.errors import TrainerError
from ppod_trainer.evaluation import Evaluator
from ppod_trainer.rollouts import ScoredRollout
from support.random_rollouts import random_rollouts
from support.scripted_services import Script, scripted_server, token_score

BAD = 999


def samples(bad: tuple[int, ...]) -> list[ScoredRollout]:
    """Of which the judge's score of some is NaN."""
    made = random_rollouts(6)
    for index in bad:
        rollout = made[index].rollout
        response = np.full_like(rollout.response, BAD)
        made[index] = replace(made[index], rollout=replace(rollout, response=response, hides_stop_token=False))
    return made


@contextmanager
def judge_of(scored: list[ScoredRollout], bad_samples: BadSamples) -> Iterator[Evaluator]:
    script = Script()

    def refuse(_: Message, __: int) -> None:
        request = cast(reward_pb2.ScoreRequest, script.requests[-1])
        for index, tokens in enumerate(unpack_sequences(request.tokens, "tokens")):
            if BAD in tokens:
                raise NonFiniteOutput("score", index, "nan")

    script.change = refuse
    collector = SimpleNamespace(collect=lambda *_: scored)
    with scripted_server(script) as server, RewardClient(server.target) as client:
        yield Evaluator(cast(Any, collector), client, [], str, bad_samples)


def expected(scored: ScoredRollout) -> float:
    tokens = scored.rollout.judged_tokens.tolist()
    return token_score(tokens) + 2 * len(tokens)


def test_a_sample_that_the_judge_refuses_stops_the_run() -> None:
    scored = samples((4,))
    with judge_of(scored, BadSamples("stop")) as evaluator, pytest.raises(NonFiniteOutput, match="sample 4"):
        evaluator.judge(scored)


@pytest.mark.parametrize("bad", [(), (4,), (0, 5), (0, 1, 2, 3, 4, 5)])
def test_samples_that_the_judge_refuses_are_left_out_of_its_mean(bad: tuple[int, ...]) -> None:
    scored = samples(bad)
    good = {one.rollout.seed: expected(one) for number, one in enumerate(scored) if number not in bad}
    with judge_of(scored, BadSamples("skip")) as evaluator:
        assert evaluator.judge(scored) == good
        evaluation = evaluator.evaluate(3, 1)
    assert evaluation.judge == (pytest.approx(np.mean(list(good.values()))) if good else None)
    assert [sample.judge for sample in evaluation.samples] == [good.get(one.rollout.seed) for one in scored]
    assert len(evaluation.samples) == 6, "the reward model's scores stay"


def test_the_judge_is_told_where_responses_begin() -> None:
    """A language model as the judge is asked about the response, and shown the prompt apart from it."""
    script, scored = Script(), samples(())
    with scripted_server(script) as server, RewardClient(server.target) as client:
        Evaluator(cast(Any, None), client, [], str).judge(scored)
    [request] = (one for one in script.requests if isinstance(one, reward_pb2.ScoreRequest))
    assert list(request.prompt_lengths) == [len(one.rollout.prompt.token_ids) for one in scored]


def test_an_evaluation_of_which_nothing_is_left_says_so() -> None:
    """A mean over nothing is no score."""
    with judge_of([], BadSamples("skip")) as evaluator, pytest.raises(TrainerError, match="step 3: all 0 samples"):
        evaluator.evaluate(3, 1)


def test_without_a_judge_nothing_is_judged() -> None:
    evaluator = Evaluator(cast(Any, None), None, [], str)
    assert evaluator.judge(random_rollouts()) == {}
