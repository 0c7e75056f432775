"""Advantages and returns from token rewards and values.

Shape legend: B sequences, T response tokens; position t holds the value of the state before token t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages and value targets, float32 [B, T], zero where the mask is false."""

    advantages: torch.Tensor
    returns: torch.Tensor


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: torch.Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), over real tokens only.

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    return_t = A_t + V_t

    Args:
        rewards: float32 [B, T].
        values: float32 [B, T].
        mask: bool [B, T]; true on action tokens. What lies between two of them (an environment's observation) is passed
            over: to the policy the next state is that of its own next token.
        gamma: discount a token.
        lam: lambda of GAE.
        bootstrap_values: float32 [B]; V of the state after the last token: 0 for a terminated response, the value
            head's for one that was cut off. None: all terminated.
    """
    real = mask.to(values.dtype)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values
    next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        # Over holes, and behind the end of a sequence, both carry on unchanged: the last token of a turn sees the value
        # of the next turn's first, and the last of all the bootstrap value.
        here = real[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = next_advantage * real[:, t]
    return Advantages(advantages, torch.where(mask, advantages + values, torch.zeros_like(values)))


def sequence_advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Advantages:
    """A = R - V(s): the response as one action, the prompt as its state (a bandit; cf. Ahmadian et al. 2024, 3.1).

    R is the undiscounted sum of the response's rewards, V(s) the value before its first token. Every token carries the
    same advantage, and R is every token's value target.
    """
    total = torch.where(mask, rewards, torch.zeros_like(rewards)).sum(dim=1, keepdim=True)
    zeros = torch.zeros_like(values)
    return Advantages(torch.where(mask, total - values[:, :1], zeros), torch.where(mask, total + zeros, zeros))
