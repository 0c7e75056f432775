"""The terms of PPO's objective for language models, as token losses; `loss` puts them together.

Shape legend: B sequences, T response tokens. Every function takes and gives float32 [B, T], unreduced: reduction is
`masking.weighted_sum`, with weights over the whole minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.ratios import bounded_exp

_SMALLEST_SPREAD = 1e-5
"""Deviation of returns, by their size, that is none: each is a float32 sum over up to thousands of tokens."""


@dataclass(frozen=True, slots=True)
class ClipRange:
    """Where the surrogate is clipped.

    Attributes:
        low: the ratio counts no lower than 1 - low where A < 0.
        high: no higher than 1 + high where A > 0; larger than `low` it leaves unlikely tokens room to grow
            (clip-higher: Yu et al. 2025, DAPO, equation 10).
        dual: no higher than this where A < 0, > 1; None: without bound (Ye et al. 2020, equation 5).
    """

    low: float
    high: float
    dual: float | None = None


def policy_token_loss(log_ratios: torch.Tensor, advantages: torch.Tensor, clip: ClipRange) -> torch.Tensor:
    """Clipped surrogate, negated (Schulman et al. 2017, equation 7): max(-A * r, -A * clip(r, 1 - low, 1 + high)).

    With dual clip, where A < 0, no more than -A * dual: a token that the policy has come to find much likelier although
    it was bad would otherwise have a loss, and a gradient, without bound.

    Args:
        log_ratios: log r, see `ratios.policy_log_ratios`.
    """
    ratio = bounded_exp(log_ratios)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip.low, 1 + clip.high))
    if clip.dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * clip.dual), loss)


def value_token_loss(
    new_values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Half the larger of the squared errors of the value and of the value clipped to old_values +- clip."""
    errors = (new_values - returns).square()
    if clip is None:
        return errors / 2
    clipped = old_values + (new_values - old_values).clamp(-clip, clip)
    return torch.maximum(errors, (clipped - returns).square()) / 2


def clipped_tokens(log_ratios: torch.Tensor, advantages: torch.Tensor, clip: ClipRange) -> torch.Tensor:
    """True where clipping took the gradient away: r above 1 + high with A > 0, below 1 - low with A < 0."""
    ratio = bounded_exp(log_ratios)
    return ((advantages > 0) & (ratio > 1 + clip.high)) | ((advantages < 0) & (ratio < 1 - clip.low))


def dual_clipped_tokens(log_ratios: torch.Tensor, advantages: torch.Tensor, clip: ClipRange) -> torch.Tensor:
    """True where the dual clip took the gradient away: r above `dual` with A < 0."""
    if clip.dual is None:
        return torch.zeros_like(advantages, dtype=torch.bool)
    return (advantages < 0) & (bounded_exp(log_ratios) > clip.dual)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over flat real tokens; 0 where the returns vary by rounding at most."""
    if not returns.numel():
        return 0.0
    exact = returns.double()
    spread = exact.var(unbiased=False)
    if spread <= (_SMALLEST_SPREAD * exact.abs().max()).square():
        return 0.0
    return float(1 - (exact - values).var(unbiased=False) / spread)
