"""Advantages and returns from token rewards and values.

Shape legend: B sequences, T response tokens; position t holds the value of the state before token t.

In all of them the mask is true on action tokens alone. What lies between two of them (an environment's observation) is
passed over: to the policy the next state is that of its own next token. `bootstrap_values`, float32 [B], is V of the
state after the last token: 0 for a response that terminated, the value head's for one that was cut off. None: all
terminated.
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
    lam: float | torch.Tensor,
    value_lam: float | None = None,
    bootstrap_values: torch.Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), over real tokens only.

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    return_t = A_t + V_t

    Args:
        rewards: float32 [B, T].
        values: float32 [B, T].
        mask: bool [B, T].
        gamma: discount a token.
        lam: lambda of GAE; one for all, or float32 [B].
        value_lam: lambda of the A_t in the value targets (decoupled GAE: Yuan et al. 2025, VC-PPO; Yue et al. 2025,
            VAPO); None: the same as for the advantages.
        bootstrap_values: see above.
    """
    deltas = _deltas(rewards, values, mask, gamma, bootstrap_values)
    advantages = _discounted_sums(deltas, mask, gamma * lam)
    targets = advantages if value_lam is None else _discounted_sums(deltas, mask, gamma * value_lam)
    return Advantages(advantages, torch.where(mask, targets + values, torch.zeros_like(values)))


def monte_carlo_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    bootstrap_values: torch.Tensor | None = None,
) -> Advantages:
    """A_t = G_t - V_t with G_t = r_t + gamma * G_{t+1}, the discounted return; G_t is the value target.

    After the last token G is the bootstrap value. Without bias from the values, and with the variance of all rewards to
    come. Arguments as for `gae`.
    """
    following = torch.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values
    returns = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = torch.where(mask[:, t], following, 0.0)
    return Advantages(torch.where(mask, returns - values, torch.zeros_like(values)), returns)


def one_step_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    bootstrap_values: torch.Tensor | None = None,
) -> Advantages:
    """A_t = r_t + gamma * V_{t+1} - V_t, the temporal difference (Sutton 1988); r_t + gamma * V_{t+1} is the target.

    The smallest variance, and all the bias of the values: with rewards on the last token alone, a value head that is
    not trained yet passes nothing on to the tokens before it. Arguments as for `gae`.
    """
    deltas = _deltas(rewards, values, mask, gamma, bootstrap_values)
    return Advantages(deltas, torch.where(mask, deltas + values, torch.zeros_like(values)))


def sequence_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    bootstrap_values: torch.Tensor | None = None,
) -> Advantages:
    """A = R - V(s): the response as one action, the prompt as its state (a bandit; cf. Ahmadian et al. 2024, 3.1).

    R is the undiscounted sum of the response's rewards and of the bootstrap value, V(s) the value before the first
    action token. Every token carries the same advantage, and R is every token's value target.
    """
    total = torch.where(mask, rewards, torch.zeros_like(rewards)).sum(dim=1, keepdim=True)
    if bootstrap_values is not None:
        total = total + bootstrap_values.unsqueeze(1)
    first = values.gather(1, mask.int().argmax(dim=1, keepdim=True))
    zeros = torch.zeros_like(values)
    return Advantages(torch.where(mask, total - first, zeros), torch.where(mask, total + zeros, zeros))


def length_adaptive_lambda(mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """lambda = 1 - 1 / (alpha * l) of each sequence, float32 [B]; l: its action tokens (Yue et al. 2025, VAPO, 4.2).

    The weights of the deltas then add up to about 1 / (1 - lambda) = alpha * l, a fixed share of the response, however
    long it is. Where alpha * l < 1, too short for that, lambda is 0.
    """
    lengths = mask.sum(dim=1).clamp(min=1).float()
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def _deltas(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    bootstrap_values: torch.Tensor | None,
) -> torch.Tensor:
    """r_t + gamma * V_{t+1} - V_t, zero where the mask is false."""
    deltas = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values
    for t in range(values.shape[1] - 1, -1, -1):
        # Over holes, and behind the end of a sequence, the next value carries on unchanged: the last token of a turn
        # sees the value of the next turn's first, and the last of all the bootstrap value.
        here = mask[:, t]
        deltas[:, t] = torch.where(here, rewards[:, t] + gamma * next_value - values[:, t], 0.0)
        next_value = torch.where(here, values[:, t], next_value)
    return deltas


def _discounted_sums(deltas: torch.Tensor, mask: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """S_t = delta_t + factor * S_{t+1} over real tokens, zero elsewhere; factor: one, or [B]."""
    sums = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        following = torch.where(mask[:, t], deltas[:, t] + factor * following, following)
        sums[:, t] = torch.where(mask[:, t], following, 0.0)
    return sums
