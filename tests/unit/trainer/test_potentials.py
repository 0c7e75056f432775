"""Potential-based shaping by hand, and the property that makes it harmless: advantages stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_models.configuration import ConfigError, parse_config
from ppod_trainer.advantages import gae, monte_carlo_advantages, one_step_advantages
from ppod_trainer.algorithms import build_estimator
from ppod_trainer.config import AdvantagesConfig, KlConfig, LengthPenaltyConfig, RewardsConfig, TrainerConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import ExperienceRules, PolicyView, build_ppo_batch
from ppod_trainer.policy import build_response_batch
from ppod_trainer.potentials import shaping_rewards
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.score_shaping import ScoreScale


def test_shaping_by_hand() -> None:
    # One turn, then one that the environment answers in the middle, padded.
    potentials = torch.tensor([[1.0, 3.0, 2.0, 9.0, 9.0], [1.0, 2.0, 7.0, 7.0, 4.0]])
    mask = torch.tensor([[True, True, True, False, False], [True, True, False, False, True]])
    found = shaping_rewards(potentials, mask, gamma=0.5)
    # 0.5 * 3 - 1, 0.5 * 2 - 3, -2; and 0.5 * 2 - 1, 0.5 * 4 - 2: what was said is the doing of the token before; -4.
    expected = torch.tensor([[0.5, -2.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, -4.0]])
    torch.testing.assert_close(found, expected)


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=80, deadline=None)
def test_a_critic_that_knows_the_potential_sees_the_same_advantages(
    rows: list[list[bool]], gamma: float, lam: float, seed: int
) -> None:
    """With values V - potential in place of V, whatever the potential, for every estimator that reads token rewards."""
    mask = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    rewards, values, potentials = (
        torch.where(mask, torch.randn(mask.shape, generator=generator, dtype=torch.float64), 0.0) for _ in range(3)
    )
    shaped = rewards + shaping_rewards(potentials, mask, gamma)
    for estimate in (
        lambda paid, known: gae(paid, known, mask, gamma=gamma, lam=lam),
        lambda paid, known: monte_carlo_advantages(paid, known, mask, gamma=gamma),
        lambda paid, known: one_step_advantages(paid, known, mask, gamma=gamma),
    ):
        plain, other = estimate(rewards, values), estimate(shaped, values - potentials)
        torch.testing.assert_close(other.advantages, plain.advantages)
        torch.testing.assert_close(other.returns, torch.where(mask, plain.returns - potentials, 0.0))
    # Discounted to the start it takes off the first potential, which no action changes.
    for row in range(len(mask)):
        terms = shaping_rewards(potentials, mask, gamma)[row][mask[row]]
        discounted = sum(float(term) * gamma**step for step, term in enumerate(terms))
        assert discounted == pytest.approx(-float(potentials[row][mask[row]][0]), abs=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_potentials_are_paid_in_the_units_of_the_score(
    make_rollouts: Callable[..., list[ScoredRollout]], clip: float | None
) -> None:
    generator = np.random.default_rng(3)
    rollouts = [
        replace(one, potentials=generator.normal(size=len(one.ref_logprobs)).astype(np.float32))
        for one in make_rollouts()
    ]
    penalty = LengthPenaltyConfig(budget_tokens=2, per_token=0.125)
    rewards = RewardsConfig(
        normalize="whiten", clip=clip, shaping="token", missing_eos_penalty=0.25, length_penalty=penalty
    )
    rules = ExperienceRules(
        rewards, KlConfig(coefficient=0.0), build_estimator(AdvantagesConfig(lam=1.0)), whiten=False
    )
    responses = build_response_batch(rollouts, torch.device("cpu"))
    zeros = torch.zeros(responses.action_mask.shape)
    controls = StepControls(1.0, 0.0, 0.0, ScoreScale(shift=0.5, scale=2.0))
    batch = build_ppo_batch(rollouts, responses, PolicyView(zeros, zeros, zeros[:, 0]), rules, controls)
    for row, one in enumerate(rollouts):
        assert one.potentials is not None
        score, potentials = (np.asarray(value) / 2 - 0.25 for value in (one.score, one.potentials))
        if clip is not None:
            score, potentials = (np.clip(value, -clip, clip) for value in (score, potentials))
        # With values of 0 and lambda 1 an advantage is what is still to come: the penalised score less the potential.
        penalties = 0.25 * one.rollout.truncated + 0.125 * max(len(potentials) - 2, 0)
        expected = score - penalties - potentials
        np.testing.assert_allclose(batch.advantages[row, : len(expected)], expected, atol=1e-6)


def problem(values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainerConfig, values, "test")
    return caught.value.problems[0]


def test_shaping_that_nobody_would_read_is_refused() -> None:
    shaped = {"shaping": "token"}
    groups = {"samples_per_prompt": 4}
    assert "kind rloo reads what whole" in problem(
        {"rewards": shaped, "advantages": {"kind": "rloo"}, "rollout": groups}
    )
    assert "kind sequence reads what whole" in problem({"rewards": shaped, "advantages": {"kind": "sequence"}})
    assert "bootstrap_truncated goes on" in problem({"rewards": shaped, "advantages": {"bootstrap_truncated": True}})
    assert "shaping" in problem({"rewards": {**shaped, "model": False}})
    assert "counts no tokens" in problem({"rewards": {"shaping": "step", "shaping_interval": 4}})
    assert problem({"rewards": {"shaping": "word"}}).startswith("rewards.shaping")
