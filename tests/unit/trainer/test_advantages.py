"""Advantages against hand-worked numbers and a plain loop that is the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_trainer.advantages import gae, sequence_advantages


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
