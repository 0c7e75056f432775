"""A step's metrics by hand: every figure under its own name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ppod_trainer.learner import UpdateStats
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout
from ppod_trainer.step_figures import rollout_figures, update_figures


def scored(response: list[int], actions: list[int], score: float, group: int, *, truncated: bool) -> ScoredRollout:
    """A response that an environment paid 0.25 besides."""
    mask = np.array(actions, np.bool_)
    rollout = Rollout(
        prompt=Prompt(0, np.array([7], np.int32)),
        response=np.array(response, np.int32),
        action_mask=mask,
        sampler_logprobs=np.zeros(len(mask), np.float32),
        versions=mask.astype(np.int64),
        turns=np.where(mask, 0, -1),
        rewards=np.array([0.25, *[0.0] * (len(mask) - 1)], np.float32),
        truncated=truncated,
        hides_stop_token=False,
        seed=0,
        group=group,
        temperature=0.7,
    )
    return ScoredRollout(rollout, score, np.zeros(len(mask), np.float32))


def test_figures_of_rollouts() -> None:
    # Token 9 is an environment's: of what the policy sampled the bigrams are 1 2, 2 2, 2 2, 5 6, 5 6.
    made = [
        scored([1, 2, 9, 2, 2], [1, 1, 0, 1, 1], 0.75, 0, truncated=False),
        scored([5, 6], [1, 1], 0.75, 0, truncated=False),
        scored([4], [1], 1.75, 1, truncated=True),
        scored([3], [1], 4.75, 1, truncated=False),
        scored([5, 6], [1, 1], 0.75, 2, truncated=False),
    ]
    assert rollout_figures(made) == {
        "score/mean": 2.0,
        "score/std": pytest.approx(2.4**0.5),
        # A single sample is paid as itself, and nothing is seen by that.
        "groups/uniform": 0.5,
        "sampler/temperature": 0.7,
        "response/length": 2.0,
        "response/distinct_2": 0.6,
        "response/truncated": 0.2,
    }
    assert rollout_figures(made[2:4])["response/distinct_2"] == 1.0, "there is no bigram that stood there before"
    assert "groups/uniform" not in rollout_figures(made[3:]), "as where all prompts are sampled once"


@pytest.mark.parametrize(("whole", "parts"), [(0.7, (0.6, 0.1)), (1000.3, (2.9, 997.4))])
def test_outcomes_that_differ_by_rounding_alone_have_no_deviation(whole: float, parts: tuple[float, float]) -> None:
    """Or nobody would be told that all of a step are paid the same, where some are so in parts."""
    scores = [float(np.float32(whole)), float(np.float32(parts[0]) + np.float32(parts[1]))]
    assert scores[0] != scores[1]
    made = [scored([5], [1], score, 0, truncated=False) for score in scores]
    assert rollout_figures(made)["score/std"] == 0.0
    assert rollout_figures([*made, scored([5], [1], whole + 0.01, 0, truncated=False)])["score/std"] > 0.004


def test_figures_of_an_update() -> None:
    names = (
        *("policy_loss", "value_loss", "kl_loss", "entropy", "clip_fraction", "dual_clip_fraction", "ratio_bounded"),
        *("grad_norm", "first_ratio_error", "approx_kl", "explained_variance"),
    )
    stats = UpdateStats(**{name: 10.0 + number for number, name in enumerate(names)}, stopped_early=True)
    # The value on padding is no value of a token.
    responses = SimpleNamespace(action_mask=torch.tensor([[True, True], [True, False]]))
    values = torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    batch = SimpleNamespace(mean_return=1.0, mean_kl=2.0, mismatched=3.0, old_values=values, responses=responses)
    expected = {
        "return/mean": 1.0,
        "kl/reference": 2.0,
        "sampler/mismatched": 3.0,
        "loss/policy": 10.0,
        "loss/value": 11.0,
        "loss/kl": 12.0,
        "policy/clip_fraction": 14.0,
        "policy/dual_clip_fraction": 15.0,
        "policy/ratio_bounded": 16.0,
        "policy/grad_norm": 17.0,
        "policy/first_ratio_error": 18.0,
        "policy/approx_kl": 19.0,
        "value/explained_variance": 20.0,
        "value/std": pytest.approx((2 / 3) ** 0.5),
        "policy/stopped_early": 1.0,
        "policy/optimizer_steps": 0.0,
    }
    assert update_figures(cast(Any, batch), stats) == expected, "without a step no entropy was measured"
    stats.optimizer_steps = 4
    steps = {"policy/optimizer_steps": 4.0, "policy/entropy": 13.0}
    assert update_figures(cast(Any, batch), stats) == expected | steps
