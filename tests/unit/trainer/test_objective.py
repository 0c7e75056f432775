"""PPO's losses by hand, and which tokens they give a gradient."""

from __future__ import annotations

import pytest
import torch

from ppod_trainer.advantages import gae
from ppod_trainer.objective import (
    ClipRange,
    clipped_tokens,
    dual_clipped_tokens,
    explained_variance,
    policy_token_loss,
    value_token_loss,
)

PLAIN = ClipRange(0.2, 0.2)
NEW = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]]))
ADVANTAGES = torch.tensor([[1.0, -1.0, 1.0, -1.0]])


def test_policy_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    # A > 0, ratio 1.5: clipped to 1.2. A < 0, ratio 1.5: not clipped. A > 0, ratio 0.5: not. A < 0, 0.5: to 0.8.
    torch.testing.assert_close(policy_token_loss(NEW, ADVANTAGES, PLAIN), torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))


def test_clips_are_one_for_each_direction() -> None:
    clip = ClipRange(low=0.1, high=0.4)
    torch.testing.assert_close(policy_token_loss(NEW, ADVANTAGES, clip), torch.tensor([[-1.4, 1.5, -0.5, 0.9]]))
    # A ratio of 1.3 with A > 0 keeps its gradient below 1 + high, although it is above 1 + low.
    within = torch.log(torch.tensor([[1.3]]))
    assert not clipped_tokens(within, torch.ones(1, 1), clip)
    assert clipped_tokens(within, torch.ones(1, 1), ClipRange(0.4, 0.1))


def test_dual_clip_bounds_what_a_bad_token_costs() -> None:
    ratios = torch.log(torch.tensor([[1.5, 4.0, 4.0, 0.5]]))
    advantages = torch.tensor([[-2.0, -2.0, 2.0, -2.0]])
    clip = ClipRange(0.2, 0.2, dual=3.0)
    # -A r = 3; bounded at -A * 3 = 6, not 8; A > 0 is clipped as ever; A < 0 below 1 - clip as ever.
    torch.testing.assert_close(policy_token_loss(ratios, advantages, clip), torch.tensor([[3.0, 6.0, -2.4, 1.6]]))
    torch.testing.assert_close(policy_token_loss(ratios, advantages, PLAIN), torch.tensor([[3.0, 8.0, -2.4, 1.6]]))
    assert dual_clipped_tokens(ratios, advantages, clip).tolist() == [[False, True, False, False]]
    assert not dual_clipped_tokens(ratios, advantages, PLAIN).any()


@pytest.mark.parametrize("clip", [PLAIN, ClipRange(0.1, 0.6), ClipRange(0.2, 0.2, dual=1.4)])
def test_clipped_tokens_are_those_without_gradient(clip: ClipRange) -> None:
    logprobs = NEW.clone().requires_grad_()
    policy_token_loss(logprobs, ADVANTAGES, clip).sum().backward()
    assert logprobs.grad is not None
    clipped = clipped_tokens(NEW, ADVANTAGES, clip) | dual_clipped_tokens(NEW, ADVANTAGES, clip)
    assert (logprobs.grad == 0).tolist() == clipped.tolist()
    if clip == PLAIN:
        assert clipped.tolist() == [[True, False, False, True]]


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    logprobs = torch.zeros(1, 4, requires_grad=True)
    policy_token_loss(logprobs, ADVANTAGES, PLAIN).sum().backward()
    torch.testing.assert_close(logprobs.grad, -ADVANTAGES)


def test_value_loss_is_half_the_larger_square() -> None:
    new, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.tensor([2.0, 2.0, 0.0])
    # Clipped values: 0.2, 0.1, -0.2. Squares: max(1, 3.24), max(3.61, 3.61), max(1, 0.04); halved.
    torch.testing.assert_close(value_token_loss(new, old, returns, 0.2), torch.tensor([1.62, 1.805, 0.5]))
    torch.testing.assert_close(value_token_loss(new, old, returns, None), torch.tensor([0.5, 1.805, 0.5]))


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3)) == 0.0
    assert explained_variance(torch.empty(0), torch.empty(0)) == 0.0


@pytest.mark.parametrize("paid", [0.1, 0.7, 30.7, 1000.1])
def test_returns_that_vary_by_rounding_alone_do_not_vary(paid: float) -> None:
    """Every response is paid the same, and lambda is 1: each return is a sum of deltas that has to give that again."""
    values = 0.05 * torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 2000, dtype=torch.bool)
    rewards = torch.where(torch.arange(2000) == 1999, paid, 0.0).expand(8, 2000)
    returns = gae(rewards, values, mask, gamma=1.0, lam=1.0).returns
    assert explained_variance(values[mask], returns[mask]) == 0.0
    assert explained_variance(values[mask], torch.full_like(returns[mask], paid)) == 0.0
    # A deviation of 0.02 is one: Var(returns - values) is 0.05^2 + 0.02^2, over 0.02^2.
    varied = returns + 0.02 * torch.randn(8, 2000, generator=torch.Generator().manual_seed(1))
    assert explained_variance(values[mask], varied[mask]) == pytest.approx(-(2.5**2), rel=0.1)
