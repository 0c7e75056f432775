"""PPO's losses by hand, and which tokens they give a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from ppod_trainer.objective import (
    clipped_tokens,
    explained_variance,
    importance_weights,
    policy_token_loss,
    value_token_loss,
)

OLD = torch.zeros(1, 4)
NEW = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]]))
ADVANTAGES = torch.tensor([[1.0, -1.0, 1.0, -1.0]])


def test_policy_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    # A > 0, ratio 1.5: clipped to 1.2. A < 0, ratio 1.5: not clipped. A > 0, ratio 0.5: not. A < 0, 0.5: to 0.8.
    torch.testing.assert_close(policy_token_loss(NEW, OLD, ADVANTAGES, 0.2), torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))


def test_clipped_tokens_are_those_without_gradient() -> None:
    logprobs = NEW.clone().requires_grad_()
    policy_token_loss(logprobs, OLD, ADVANTAGES, 0.2).sum().backward()
    assert logprobs.grad is not None
    clipped = clipped_tokens(NEW, OLD, ADVANTAGES, 0.2)
    assert clipped.tolist() == [[True, False, False, True]]
    assert (logprobs.grad == 0).tolist() == clipped.tolist()


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    logprobs = OLD.clone().requires_grad_()
    policy_token_loss(logprobs, OLD, ADVANTAGES, 0.2).sum().backward()
    torch.testing.assert_close(logprobs.grad, -ADVANTAGES)


def test_value_loss_is_half_the_larger_square() -> None:
    new, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.tensor([2.0, 2.0, 0.0])
    # Clipped values: 0.2, 0.1, -0.2. Squares: max(1, 3.24), max(3.61, 3.61), max(1, 0.04); halved.
    torch.testing.assert_close(value_token_loss(new, old, returns, 0.2), torch.tensor([1.62, 1.805, 0.5]))
    torch.testing.assert_close(value_token_loss(new, old, returns, None), torch.tensor([0.5, 1.805, 0.5]))


def test_importance_weights_are_capped_and_have_no_gradient() -> None:
    old = torch.tensor([math.log(3.0), math.log(0.5)], requires_grad=True)
    weights = importance_weights(old, torch.zeros(2), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5]))
    assert not weights.requires_grad


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3)) == 0.0
