"""Ratios of tokens and sequences: values, gradients, and what happens where exp would overflow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppod_trainer.objective import ClipRange, policy_token_loss
from ppod_trainer.ratios import BOUND, bounded_exp, bounded_expm1, policy_log_ratios

MASK = torch.tensor([[True, True, False], [True, True, True]])


def gradient_of(values: torch.Tensor) -> tuple[float, float]:
    """Value and gradient of bounded_exp."""
    leaf = values.clone().requires_grad_()
    result = bounded_exp(leaf)
    result.backward()
    assert leaf.grad is not None
    return float(result.detach()), float(leaf.grad)


@given(st.floats(-80, BOUND))
def test_value_and_gradient_are_those_of_exp_up_to_the_bound(value: float) -> None:
    expected = math.exp(value)
    assert gradient_of(torch.tensor(value, dtype=torch.float64)) == pytest.approx((expected, expected))
    assert float(bounded_expm1(torch.tensor(value, dtype=torch.float64))) == pytest.approx(math.expm1(value))


@pytest.mark.parametrize("value", [21.0, 88.0, 1e4])
def test_beyond_the_bound_nothing_overflows_and_the_gradient_does_not_vanish(value: float) -> None:
    assert gradient_of(torch.tensor(value)) == pytest.approx((math.exp(BOUND), math.exp(BOUND)), rel=1e-6)


def test_small_differences_keep_their_digits() -> None:
    assert float(bounded_expm1(torch.tensor(1e-9))) == pytest.approx(1e-9, rel=1e-6)
    assert float(bounded_exp(torch.tensor(0.0))) == 1.0


def test_a_clipped_token_that_would_overflow_has_gradient_zero_and_not_nan() -> None:
    """exp(200) is inf in float32, and inf * 0 in the backward pass of the clipped branch would be NaN."""
    logs = torch.tensor([[200.0, 0.0]], requires_grad=True)
    policy_token_loss(logs, torch.tensor([[1.0, 1.0]]), ClipRange(0.2, 0.2)).sum().backward()
    assert logs.grad is not None
    assert logs.grad.tolist() == [[0.0, -1.0]]
    # Where it is not clipped it is large, and finite.
    logs = torch.tensor([[200.0]], requires_grad=True)
    policy_token_loss(logs, torch.tensor([[-1.0]]), ClipRange(0.2, 0.2)).sum().backward()
    assert logs.grad is not None
    assert float(logs.grad) == pytest.approx(math.exp(BOUND), rel=1e-6)


def test_ratios_of_sequences_by_hand() -> None:
    new = torch.log(torch.tensor([[2.0, 8.0, 99.0], [1.0, 2.0, 4.0]]))
    old = torch.zeros(2, 3)
    token = policy_log_ratios(new, old, MASK, "token").exp()
    torch.testing.assert_close(token, torch.tensor([[2.0, 8.0, 1.0], [1.0, 2.0, 4.0]]))
    # Geometric means: sqrt(16) and the cube root of 8.
    expected = torch.tensor([[4.0, 4.0, 1.0], [2.0, 2.0, 2.0]])
    for level in ("sequence", "sequence_token"):
        torch.testing.assert_close(policy_log_ratios(new, old, MASK, level).exp(), expected)


def gradient(level: str, advantages: torch.Tensor) -> torch.Tensor:
    new = torch.log(torch.tensor([[1.05, 0.9, 7.0], [1.0, 1.1, 1.02]])).requires_grad_()
    ratios = policy_log_ratios(new, torch.zeros(2, 3), MASK, level)  # type: ignore[arg-type]
    losses = policy_token_loss(ratios, advantages, ClipRange(0.2, 0.2))
    torch.where(MASK, losses, 0.0).sum().backward()
    assert new.grad is not None
    return new.grad


def test_gradients_of_sequence_ratios() -> None:
    """With one advantage a sequence both forms have GSPO's gradient, s * A for each of its tokens; with several,
    `sequence` averages them and `sequence_token` keeps each."""
    means = torch.tensor([[math.log(1.05 * 0.9) / 2], [math.log(1.1 * 1.02) / 3]]).exp() * MASK
    equal = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]])
    torch.testing.assert_close(gradient("sequence", equal), -means * equal)
    torch.testing.assert_close(gradient("sequence_token", equal), -means * equal)
    own = torch.tensor([[2.0, 0.0, 5.0], [-1.0, 2.0, 5.0]])
    averages = torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(gradient("sequence", own), -means * averages)
    torch.testing.assert_close(gradient("sequence_token", own), -means * own)
