"""Weights for, and masks of, what the sampler's probabilities make of a sample."""

from __future__ import annotations

import math

import pytest
import torch

from ppod_trainer.sampler_mismatch import MaskLevel, importance_weights, tokens_within

MASK = torch.tensor([[True, True, False], [True, True, True]])
RHO = torch.tensor([[3.0, 0.5, 99.0], [1.0, 0.25, 2.0]])
OLD = torch.log(RHO)
SAMPLER = torch.zeros(2, 3)


def test_weights_of_tokens_are_capped_and_have_no_gradient() -> None:
    old = OLD.clone().requires_grad_()
    weights = importance_weights(old, SAMPLER, MASK, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 1.0], [1.0, 0.25, 2.0]]))
    assert not weights.requires_grad


def test_weights_of_sequences_are_products_over_their_tokens() -> None:
    weights = importance_weights(OLD, SAMPLER, MASK, cap=1.2, level="sequence")
    torch.testing.assert_close(weights, torch.tensor([[1.2, 1.2, 1.2], [0.5, 0.5, 0.5]]))


def test_a_weight_that_overflows_is_the_cap() -> None:
    assert float(importance_weights(torch.tensor([[300.0]]), torch.zeros(1, 1), torch.ones(1, 1).bool(), 2.0)) == 2.0


@pytest.mark.parametrize(
    ("level", "bounds", "expected"),
    [
        ("token", (0.4, 2.5), [[False, True, False], [True, False, True]]),
        ("token", (0.25, 3.0), [[True, True, False], [True, True, True]]),
        # Products 1.5 and 0.5; geometric means sqrt(1.5) = 1.22 and the cube root of 0.5 = 0.79.
        ("sequence", (0.6, 2.0), [[True, True, False], [False, False, False]]),
        ("sequence", (0.4, 1.4), [[False, False, False], [True, True, True]]),
        ("geometric", (0.7, 1.3), [[True, True, False], [True, True, True]]),
        ("geometric", (0.8, 1.3), [[True, True, False], [False, False, False]]),
    ],
)
def test_masks_by_hand(level: MaskLevel, bounds: tuple[float, float], expected: list[list[bool]]) -> None:
    assert tokens_within(OLD, SAMPLER, MASK, bounds, level).tolist() == expected


def test_weighting_by_sequences_recovers_the_expectation_under_the_other_policy() -> None:
    """E_sampler[w f] = E_old[f] over all pairs of two tokens, enumerated; by tokens it does not."""
    sampler = torch.log(torch.tensor([0.7, 0.3], dtype=torch.float64))
    old = torch.log(torch.tensor([0.4, 0.6], dtype=torch.float64))
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    payoff = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    probability = sampler[pairs].sum(dim=1).exp()
    weights = importance_weights(old[pairs], sampler[pairs], torch.ones(4, 2).bool(), math.inf, "sequence")[:, 0]
    expected = float((old[pairs].sum(dim=1).exp() * payoff).sum())
    assert float((probability * weights * payoff).sum()) == pytest.approx(expected)
