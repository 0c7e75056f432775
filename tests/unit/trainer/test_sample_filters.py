"""What is never trained on, counted by its reason."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from ppod.client import RewardComponent, RewardKind, Scores
from ppod.client.identity import ModelState, Timing
from ppod_trainer.config import FiltersConfig, SafetyFilterConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.prompts import Prompt
from ppod_trainer.reward_components import component_scores
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn
from ppod_trainer.sample_filters import keep_trainable, repetition


def scored(tokens: list[int], score: float = 0.5, **components: float) -> ScoredRollout:
    length = len(tokens)
    turn = Turn(
        np.array(tokens, dtype=np.int32),
        np.zeros(length, dtype=np.float32),
        np.ones(length, dtype=np.int64),
        False,
        True,
    )
    rollout = Rollout.of_turn(Prompt(0, np.array([1], dtype=np.int32)), turn, seed=7)
    return ScoredRollout(rollout, score, np.zeros(length, dtype=np.float32), components)


def test_repetition_by_hand() -> None:
    # Bigrams of 1 2 1 2 1: 12 21 12 21: two of four stood there before. Of 7 7 7 7: two of three.
    assert repetition(np.array([1, 2, 1, 2, 1], dtype=np.int32), 2) == pytest.approx(0.5)
    assert repetition(np.array([7, 7, 7, 7], dtype=np.int32), 2) == pytest.approx(2 / 3)
    assert repetition(np.array([1, 2, 3, 4], dtype=np.int32), 2) == 0.0
    assert repetition(np.array([1], dtype=np.int32), 2) == 0.0


def test_a_share_that_equals_the_bound_is_no_larger() -> None:
    """Of ten tokens three, four and so on stood there before."""
    for repeated in range(1, 10):
        tokens = [*range(1, 10 - repeated + 1), *[1] * repeated]
        at, below = (FiltersConfig(max_repetition=bound / 10, repetition_ngram=1) for bound in (repeated, repeated - 1))
        assert keep_trainable([scored(tokens)], at, 1)[1]["repetitive"] == 0
        assert keep_trainable([scored(tokens)], below, 1)[1]["repetitive"] == 1


def test_each_reason_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = FiltersConfig(
        min_tokens=2,
        max_repetition=0.5,
        repetition_ngram=2,
        safety=SafetyFilterConfig(reward="harmless", at_least=0.0),
    )
    samples = [
        scored([1, 2, 3], harmless=0.0),
        scored([4], harmless=1.0),
        scored([7, 7, 7, 7], harmless=1.0),
        scored([1, 2, 1, 2, 1], harmless=1.0),
        scored([5, 6, 7], harmless=-0.1),
        scored([5, 6, 8], harmless=-3.0),
    ]
    with caplog.at_level(logging.WARNING):
        kept, counts = keep_trainable(samples, config, step=3)
    assert kept == [samples[0], samples[3]]
    assert counts == {"short": 1, "repetitive": 1, "unsafe": 2}
    assert caplog.messages == ["step 3: 4 of 6 samples are not trained on: 1 short, 1 repetitive, 2 unsafe"]


@pytest.mark.parametrize("at_least", [0.9, 0.7, 0.1, 100.1, -0.3, 0.0])
def test_the_lowest_safe_score_is_safe_as_float32_has_it(at_least: float) -> None:
    config = FiltersConfig(safety=SafetyFilterConfig(reward="harmless", at_least=at_least))
    lowest = float(np.float32(at_least))
    samples = [scored([1], harmless=lowest), scored([1], harmless=lowest - 1e-3)]
    assert keep_trainable(samples, config, 1)[0] == samples[:1]


def test_without_filters_all_is_kept_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    samples = [scored([7, 7, 7, 7, 7, 7]), scored([1])]
    kept, counts = keep_trainable(samples, FiltersConfig(), step=1)
    assert kept == samples
    assert set(counts.values()) == {0}
    assert not caplog.messages


def test_only_what_the_policy_sampled_is_looked_at() -> None:
    one = scored([1, 2, 7, 7, 7, 7])
    mask = np.array([True, True, False, False, False, False])
    observed = replace(one, rollout=replace(one.rollout, action_mask=mask))
    config = FiltersConfig(max_repetition=0.1, repetition_ngram=1)
    assert keep_trainable([observed], config, 1)[0] == [observed]
    assert keep_trainable([one], config, 1)[0] == []


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(TrainerError, match="step 4, sample 1: the score is nan"):
        keep_trainable([scored([1]), scored([1], float("nan"))], FiltersConfig(), 4)


@pytest.mark.parametrize("paid", ["nan", "inf"])
def test_an_environments_reward_that_is_no_number_is_an_error(paid: str) -> None:
    one = scored([1, 2])
    bad = replace(one, rollout=replace(one.rollout, rewards=np.array([0.0, float(paid)], dtype=np.float32)))
    with pytest.raises(TrainerError, match=rf"step 4, sample 1 \(seed 7\): the environment paid {paid}"):
        keep_trainable([one, bad], FiltersConfig(), 4)


def test_a_safety_reward_that_is_not_asked_is_named() -> None:
    config = FiltersConfig(safety=SafetyFilterConfig(reward="harmless", at_least=0.0))
    with pytest.raises(TrainerError, match=r"'harmless', which is no part of the scores \(their parts: helpful, sum\)"):
        keep_trainable([scored([1], helpful=1.0, sum=1.0)], config, 1)


def test_components_are_read_from_the_whole_tree() -> None:
    def component(name: str, values: list[float], *members: RewardComponent) -> RewardComponent:
        kind = RewardKind.SUM if members else RewardKind.FUNCTION
        array = np.array(values, dtype=np.float32)
        return RewardComponent(name, kind, None, array, None, None, None, None, 0.0, members, None, (0, 0))

    tree = component("sum", [1.0, 2.0], component("helpful", [0.5, 0.25]), component("harmless", [0.5, 1.75]))
    state, timing = ModelState("sum", 0, "x"), Timing(0.0, 0.0, 0)
    values = np.array([1.0, 2.0], dtype=np.float32)
    assert component_scores(Scores(values, (0, 0), state, timing, tree)) == [
        {"sum": 1.0, "helpful": 0.5, "harmless": 0.5},
        {"sum": 2.0, "helpful": 0.25, "harmless": 1.75},
    ]
    assert component_scores(Scores(values, (0, 0), state, timing)) == [{}, {}]
