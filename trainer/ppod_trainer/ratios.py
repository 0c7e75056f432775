"""Ratios of probabilities from differences of log-probabilities, of tokens and of sequences, safe from overflow.

exp overflows float32 at 88, and inf * 0 in a backward pass is NaN: one token with a log-ratio of 90 would spoil the
whole minibatch, even where clipping takes its gradient away. A clamp before exp would be worse: beyond it the gradient
would silently be 0. So up to BOUND value and gradient are exact, and beyond it both are those at BOUND, exp(20), or
4.9e8: finite, never 0, and the norm's clipping sees them. `policy/ratio_bounded` counts such tokens; it is 0 in a sound
run.

Shape legend: B sequences, T response tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

RatioLevel = Literal["token", "sequence", "sequence_token"]

BOUND = 20.0
"""Log-ratio beyond which exp is held."""


def bounded_exp(values: torch.Tensor) -> torch.Tensor:
    """exp(values), value and gradient exact up to BOUND and those at BOUND beyond it; exactly 1 at 0."""
    held = values.detach()
    return torch.exp(held.clamp(max=BOUND)) * (1 + (values - held))


def bounded_expm1(values: torch.Tensor) -> torch.Tensor:
    """exp(values) - 1 without loss of digits near 0; otherwise as `bounded_exp`."""
    held = values.detach()
    capped = held.clamp(max=BOUND)
    return torch.expm1(capped) + torch.exp(capped) * (values - held)


def policy_log_ratios(
    new_logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, level: RatioLevel
) -> torch.Tensor:
    """log r_t of every token, float32 [B, T]; arguments float32 [B, T], mask bool [B, T].

    token: log r_t = log pi(t) - log pi_old(t) (Schulman et al. 2017).
    sequence: log s = mean_t (log pi(t) - log pi_old(t)) over the mask, the same for all tokens of a sequence; its
        gradient goes to all of them alike (GSPO: Zheng et al. 2025, equation 7). Advantages that differ within a
        sequence are in effect averaged.
    sequence_token: the value of `sequence`, the gradient of `token`: s_t = sg[s] * pi(t) / sg[pi(t)], so that each
        token keeps its own advantage (GSPO-token, equation 14).
    """
    differences = torch.where(mask, new_logprobs - old_logprobs, 0.0)
    if level == "token":
        return differences
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    of_sequence = torch.where(mask, differences.sum(dim=1, keepdim=True) / lengths, 0.0)
    if level == "sequence":
        return of_sequence
    return of_sequence.detach() + (differences - differences.detach())
