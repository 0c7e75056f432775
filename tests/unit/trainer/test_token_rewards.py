"""Where the score lands, and what the penalty touches."""

from __future__ import annotations

import torch

from ppod_trainer.token_rewards import token_rewards

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_score_lands_on_the_last_response_token() -> None:
    rewards = token_rewards(torch.tensor([2.0, -1.0]), None, MASK, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0]]))


def test_kl_is_paid_on_real_tokens_only_even_when_padding_is_nan() -> None:
    kl = torch.tensor([[1.0, -2.0, 3.0], [4.0, float("nan"), float("inf")]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, MASK, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 1.7], [-1.4, 0.0, 0.0]]))


def test_the_score_lands_on_the_last_action_and_rewards_of_turns_where_they_were_paid() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, False, False]])
    kl = torch.tensor([[1.0, 7.0, 2.0, 7.0], [0.0, 0.0, 7.0, 7.0]])
    turns = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 0.25, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, mask, 0.1, turns)
    torch.testing.assert_close(rewards, torch.tensor([[0.4, 0.0, 1.8, 0.0], [0.0, -0.75, 0.0, 0.0]]))
