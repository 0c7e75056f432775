"""Advantages against hand-worked numbers and a plain loop that is the specification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_trainer.advantages import (
    gae,
    length_adaptive_lambda,
    monte_carlo_advantages,
    one_step_advantages,
    sequence_advantages,
)
from ppod_trainer.algorithms import Experience, build_estimator
from ppod_trainer.config import AdvantagesConfig


def plain_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float
) -> tuple[list[float], list[float]]:
    """Schulman et al. 2016, equation 16, one sequence without padding, as a sum over deltas."""
    following = [*values[1:], bootstrap]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_gae_by_hand() -> None:
    # delta_1 = 2 + 0 - 1 = 1; delta_0 = 0.5 + 0.9 * 1 - 0.5 = 0.9; A_0 = 0.9 + 0.9 * 0.5 * 1 = 1.35
    result = gae(
        torch.tensor([[0.5, 2.0]]), torch.tensor([[0.5, 1.0]]), torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.5
    )
    torch.testing.assert_close(result.advantages, torch.tensor([[1.35, 1.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[1.85, 2.0]]))


def test_truncation_bootstraps_and_termination_does_not() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    values = torch.zeros(2, 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    result = gae(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap_values=torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(result.advantages, torch.tensor([[1.0, 1.0], [6.0, 6.0]]))


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_gae_equals_the_plain_loop_whatever_the_padding(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    width = max(lengths) + 2
    rewards = generator.normal(size=(len(lengths), width))
    values = generator.normal(size=(len(lengths), width))
    bootstrap = generator.normal(size=len(lengths))
    mask = np.arange(width)[None] < np.array(lengths)[:, None]
    result = gae(
        torch.tensor(rewards),
        torch.tensor(values),
        torch.tensor(mask),
        gamma=gamma,
        lam=lam,
        bootstrap_values=torch.tensor(bootstrap),
    )
    for row, length in enumerate(lengths):
        advantages, returns = plain_gae(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam, float(bootstrap[row])
        )
        assert result.advantages[row, :length].tolist() == pytest.approx(advantages, abs=1e-9)
        assert result.returns[row, :length].tolist() == pytest.approx(returns, abs=1e-9)
        assert result.advantages[row, length:].abs().sum() == 0
        assert result.returns[row, length:].abs().sum() == 0


@given(
    holes=st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_gae_passes_over_holes(holes: list[list[bool]], gamma: float, lam: float, seed: int) -> None:
    """With observations between its turns a policy's advantages are those of its own tokens put together."""
    generator = np.random.default_rng(seed)
    mask = np.array(holes)
    rewards, values = (np.where(mask, generator.normal(size=mask.shape), 1e9) for _ in range(2))
    bootstrap = generator.normal(size=len(mask))
    result = gae(
        torch.tensor(rewards),
        torch.tensor(values),
        torch.tensor(mask),
        gamma=gamma,
        lam=lam,
        bootstrap_values=torch.tensor(bootstrap),
    )
    for row, here in enumerate(mask):
        advantages, returns = plain_gae(
            rewards[row, here].tolist(), values[row, here].tolist(), gamma, lam, float(bootstrap[row])
        )
        assert result.advantages[row, here].tolist() == pytest.approx(advantages, abs=1e-9)
        assert result.returns[row, here].tolist() == pytest.approx(returns, abs=1e-9)
        assert result.advantages[row, ~here].abs().sum() == 0
        assert result.returns[row, ~here].abs().sum() == 0


def test_sequence_advantages_by_hand() -> None:
    rewards = torch.tensor([[-0.5, 2.0, 9.0], [1.0, 9.0, 9.0]])
    values = torch.tensor([[0.25, 7.0, 7.0], [3.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    result = sequence_advantages(rewards, values, mask)
    torch.testing.assert_close(result.advantages, torch.tensor([[1.25, 1.25, 0.0], [-2.0, 0.0, 0.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[1.5, 1.5, 0.0], [1.0, 0.0, 0.0]]))


def plain_monte_carlo(rewards: list[float], values: list[float], gamma: float, bootstrap: float) -> list[float]:
    length = len(rewards)
    returns = [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, length)) + gamma ** (length - t) * bootstrap
        for t in range(length)
    ]
    return [g - v for g, v in zip(returns, values, strict=True)]


def plain_one_step(rewards: list[float], values: list[float], gamma: float, bootstrap: float) -> list[float]:
    return [r + gamma * n - v for r, n, v in zip(rewards, [*values[1:], bootstrap], values, strict=True)]


def plain_sequence(rewards: list[float], values: list[float], bootstrap: float) -> list[float]:
    return [sum(rewards) + bootstrap - values[0]] * len(rewards)


@given(
    holes=st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    bootstrapped=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_every_estimator_equals_its_plain_loop_over_real_tokens(
    holes: list[list[bool]], gamma: float, bootstrapped: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = np.array(holes)
    rewards, values = (np.where(mask, generator.normal(size=mask.shape), 1e9) for _ in range(2))
    bootstrap = generator.normal(size=len(mask)) if bootstrapped else np.zeros(len(mask))
    tensors = [torch.tensor(one) for one in (rewards, values, mask)]
    given_bootstrap = torch.tensor(bootstrap) if bootstrapped else None
    found = [
        monte_carlo_advantages(*tensors, gamma=gamma, bootstrap_values=given_bootstrap),
        one_step_advantages(*tensors, gamma=gamma, bootstrap_values=given_bootstrap),
        sequence_advantages(*tensors, bootstrap_values=given_bootstrap),
    ]
    for row, here in enumerate(mask):
        r, v, b = rewards[row, here].tolist(), values[row, here].tolist(), float(bootstrap[row])
        plain = [plain_monte_carlo(r, v, gamma, b), plain_one_step(r, v, gamma, b), plain_sequence(r, v, b)]
        targets = [*plain[:2], [a + v[0] - w for a, w in zip(plain[2], v, strict=True)]]
        for result, advantages, target in zip(found, plain, targets, strict=True):
            assert result.advantages[row, here].tolist() == pytest.approx(advantages, abs=1e-9)
            returns = [t + w for t, w in zip(target, v, strict=True)]
            assert result.returns[row, here].tolist() == pytest.approx(returns, abs=1e-9)
            assert result.advantages[row, ~here].abs().sum() == 0
            assert result.returns[row, ~here].abs().sum() == 0


def test_monte_carlo_and_one_step_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[2.0, 3.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    # Returns from the back, gamma 0.5: 4 + 0.5 * 2 = 5; 0 + 2.5; 1 + 1.25.
    cut_off = monte_carlo_advantages(rewards, values, mask, gamma=0.5, bootstrap_values=torch.tensor([2.0]))
    torch.testing.assert_close(cut_off.returns, torch.tensor([[2.25, 2.5, 5.0]]))
    torch.testing.assert_close(cut_off.advantages, torch.tensor([[0.25, -0.5, 4.0]]))
    ended = monte_carlo_advantages(rewards, values, mask, gamma=0.5)
    torch.testing.assert_close(ended.returns, torch.tensor([[2.0, 2.0, 4.0]]))
    # 1 + 0.5 * 3 - 2; 0 + 0.5 * 1 - 3; 4 + 0.5 * 2 - 1.
    one_step = one_step_advantages(rewards, values, mask, gamma=0.5, bootstrap_values=torch.tensor([2.0]))
    torch.testing.assert_close(one_step.advantages, torch.tensor([[0.5, -2.5, 4.0]]))
    torch.testing.assert_close(one_step.returns, torch.tensor([[2.5, 0.5, 5.0]]))


def test_policy_and_value_have_a_lambda_each() -> None:
    # Deltas: 0.5 + 0.9 - 0.5 = 0.9 and 1. Policy, lambda 0.5: 1.35; value, lambda 1: 0.9 + 0.9 = 1.8, plus V = 0.5.
    rewards, values = torch.tensor([[0.5, 2.0]]), torch.tensor([[0.5, 1.0]])
    result = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.5, value_lam=1.0)
    torch.testing.assert_close(result.advantages, torch.tensor([[1.35, 1.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[2.3, 2.0]]))


def test_lambda_by_length() -> None:
    # alpha 0.5, lengths 4, 8 and 1: 1 - 1/2, 1 - 1/4, and 0 where alpha * l is below 1.
    mask = torch.arange(8)[None] < torch.tensor([[4], [8], [1]])
    torch.testing.assert_close(length_adaptive_lambda(mask, 0.5), torch.tensor([0.5, 0.75, 0.0]))
    # Holes are no length.
    torch.testing.assert_close(length_adaptive_lambda(torch.tensor([[True, False, True]]), 1.0), torch.tensor([0.5]))
    rewards, values = torch.randn(3, 8), torch.randn(3, 8)
    result = gae(rewards, values, mask, gamma=0.9, lam=length_adaptive_lambda(mask, 0.5))
    for row, (length, lam) in enumerate(((4, 0.5), (8, 0.75), (1, 0.0))):
        plain, _ = plain_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), 0.9, lam, 0.0)
        assert result.advantages[row, :length].tolist() == pytest.approx(plain, abs=1e-5)


ONE_TOKEN = Experience(
    rewards=torch.tensor([[1.0], [1.0]]),
    paid=torch.tensor([[1.0], [1.0]]),
    outcomes=torch.tensor([1.0, 1.0]),
    values=torch.tensor([[0.25], [0.25]]),
    next_values=torch.tensor([8.0, 8.0]),
    mask=torch.ones(2, 1, dtype=torch.bool),
    truncated=torch.tensor([False, True]),
    groups=torch.arange(2),
    prompts=torch.arange(2),
    turns=torch.zeros(2, 1, dtype=torch.int64),
    contexts=torch.arange(2)[:, None],
    observations=torch.arange(2)[:, None],
)


@pytest.mark.parametrize("kind", ["gae", "monte_carlo", "one_step", "sequence"])
def test_the_value_behind_a_cut_counts_where_asked_and_never_behind_an_end(kind: str) -> None:
    def advantages(bootstrap: bool) -> list[float]:
        config = AdvantagesConfig.model_validate({"kind": kind, "bootstrap_truncated": bootstrap})
        return build_estimator(config).estimate(ONE_TOKEN).advantages.flatten().tolist()

    assert advantages(False) == [0.75, 0.75]
    assert advantages(True) == [0.75, 8.75]


def test_configured_lambdas_reach_the_estimate() -> None:
    experience = replace(
        ONE_TOKEN,
        rewards=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        values=torch.tensor([[0.0, 0.0], [0.0, 0.0]]),
        mask=torch.ones(2, 2, dtype=torch.bool),
    )
    separate = build_estimator(AdvantagesConfig(lam=0.5, value_lam=1.0)).estimate(experience)
    assert separate.advantages[0].tolist() == [0.5, 1.0]
    assert separate.returns[0].tolist() == [1.0, 1.0]
    by_length = build_estimator(AdvantagesConfig(lam=0.5, lam_length_alpha=2.0)).estimate(experience)
    assert by_length.advantages[0].tolist() == [0.75, 1.0]
    assert by_length.returns[0].tolist() == [0.75, 1.0]


def test_lambdas_that_would_not_be_read_are_refused() -> None:
    for key in ("value_lam", "lam_length_alpha"):
        with pytest.raises(ValueError, match=f"{key} belongs to GAE; kind 'sequence'"):
            AdvantagesConfig.model_validate({"kind": "sequence", key: 0.5})
    for kind in ("sequence", "monte_carlo", "grpo", "reinforce_pp"):
        with pytest.raises(ValueError, match=f"lam is 1, and kind {kind} has no lambda: leave it out"):
            AdvantagesConfig.model_validate({"kind": kind, "lam": 1})
        assert AdvantagesConfig.model_validate({"kind": kind, "lam": 0.95}).lam == 0.95


@pytest.mark.parametrize("kind", ["sequence", "grpo", "dr_grpo", "rloo", "pvpo", "gigpo"])
def test_a_discount_that_nothing_reads_is_refused(kind: str) -> None:
    told = "set gigpo.gamma, and leave this out" if kind == "gigpo" else "leave it out"
    with pytest.raises(ValueError, match=f"gamma is 0.99, and kind {kind} does not discount tokens: {told}"):
        AdvantagesConfig.model_validate({"kind": kind, "gamma": 0.99})
    assert AdvantagesConfig.model_validate({"kind": kind, "gamma": 1}).gamma == 1


@pytest.mark.parametrize("kind", ["gae", "monte_carlo", "one_step", "spa", "reinforce_pp", "reinforce_pp_baseline"])
def test_a_discount_is_taken_where_it_is_read(kind: str) -> None:
    assert AdvantagesConfig.model_validate({"kind": kind, "gamma": 0.99}).gamma == 0.99
