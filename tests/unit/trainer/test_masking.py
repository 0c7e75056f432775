"""Masked statistics: whitening, loss weights, and masked values that cannot leak."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_trainer.masking import loss_weights, masked_mean, masked_variance, weighted_sum, whiten

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_statistics_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, 99.0, 99.0]])
    assert float(masked_mean(values, MASK)) == 3.0
    assert float(masked_variance(values, MASK)) == 7.0  # (4 + 1 + 9) / 2


def test_whitening_uses_real_tokens_only_and_rewards_keep_their_mean() -> None:
    values = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]])
    spread = 7.0**0.5
    torch.testing.assert_close(
        whiten(values, MASK), torch.tensor([[-2 / spread, -1 / spread, 0.0], [3 / spread, 0.0, 0.0]])
    )
    kept = whiten(values, MASK, shift_mean=False)
    assert float(masked_mean(kept, MASK)) == pytest.approx(3.0, abs=1e-6)
    assert float(masked_variance(kept, MASK)) == pytest.approx(1.0, abs=1e-6)


@given(shift=st.floats(-100, 100), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_whitened_values_do_not_see_a_shift(shift: float, seed: int) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([[5], [2], [3]])
    torch.testing.assert_close(whiten(values, mask), whiten(values + shift, mask), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 30.7, 1000.1, 100_000.1])
@pytest.mark.parametrize("tokens", [3, 7, 100, 5000])
def test_equal_values_are_whitened_to_nothing(value: float, tokens: int) -> None:
    values = torch.full((1, tokens + 1), value)
    mask = torch.arange(tokens + 1)[None] < tokens
    assert not whiten(values, mask).any()
    kept = torch.where(mask, values, 0.0)
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), kept, atol=0, rtol=0)


def test_small_differences_far_from_zero_are_whitened_as_they_are() -> None:
    # 4096 and 4096.0625 in turns: mean in the middle, variance 2 ** -10 * n / (n - 1).
    values = 4096 + 0.0625 * (torch.arange(1000) % 2)[None]
    expected = torch.where(values > 4096, 1.0, -1.0) * (0.999 / (1 + 0.999e-8 * 2**10)) ** 0.5
    torch.testing.assert_close(whiten(values, values > 0), expected, atol=1e-6, rtol=0)


def test_loss_weights_by_hand() -> None:
    torch.testing.assert_close(loss_weights(MASK, "token_mean"), torch.tensor([[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]]))
    torch.testing.assert_close(loss_weights(MASK, "sequence_mean"), torch.tensor([[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]]))


def test_constant_weights_depend_on_no_length() -> None:
    weights = loss_weights(MASK, "constant", constant_tokens=4)
    torch.testing.assert_close(weights, torch.tensor([[1 / 8, 1 / 8, 0.0], [1 / 8, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="needs constant_tokens"):
        loss_weights(MASK, "constant")


def test_a_sequence_without_a_token_does_not_count() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    torch.testing.assert_close(loss_weights(mask, "constant", 5), torch.tensor([[0.2, 0.2], [0.0, 0.0]]))
    torch.testing.assert_close(loss_weights(mask, "sequence_mean"), torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


def test_a_masked_token_has_no_gradient_even_when_it_is_nan() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, float("inf"), 0.0]], requires_grad=True)
    weighted_sum(values, loss_weights(MASK, "token_mean")).backward()
    torch.testing.assert_close(values.grad, MASK.float() / 3)
