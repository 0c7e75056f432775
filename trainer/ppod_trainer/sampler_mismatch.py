"""What the trainer does about a sampler whose probabilities are not its own: weights, and samples left out.

The sampler runs other kernels, another precision, or older weights. With rho_t = pi_old(t) / pi_sampler(t):

    weights    min(rho, cap) on the policy loss: truncated importance sampling
    masking    tokens or sequences with rho outside [low, high] are no part of the loss

Shape legend: B sequences, T response tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

from ppod_trainer.ratios import bounded_exp

WeightLevel = Literal["token", "sequence"]
MaskLevel = Literal["token", "sequence", "geometric"]


def importance_weights(
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mask: torch.Tensor,
    cap: float,
    level: WeightLevel = "token",
) -> torch.Tensor:
    """Truncated importance weights min(rho, cap), float32 [B, T], without gradient.

    token: rho_t of each token, which has little variance and is biased, for a token's context was sampled by the other
    policy, too. sequence: the product of rho_t over the sequence's tokens in the mask, unbiased up to the cap; of use
    for short responses, for its variance grows with the length.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; Ionides 2008.
    """
    logs = _log_ratios(old_logprobs, sampler_logprobs, mask)
    if level == "sequence":
        logs = logs.sum(dim=1, keepdim=True).expand_as(logs)
    return bounded_exp(logs).clamp(max=cap)


def tokens_within(
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mask: torch.Tensor,
    bounds: tuple[float, float],
    level: MaskLevel,
) -> torch.Tensor:
    """The part of the mask, bool [B, T], whose rho lies within `bounds`, both ends included.

    token: each by its own rho_t (IcePop: Ling Team 2025). sequence: all of a sequence by the product of its rho_t
    (masked importance sampling: Liu et al. 2025). geometric: by their geometric mean, which length does not widen.
    """
    logs = _log_ratios(old_logprobs, sampler_logprobs, mask)
    if level != "token":
        logs = logs.sum(dim=1, keepdim=True)
    if level == "geometric":
        logs = logs / mask.sum(dim=1, keepdim=True).clamp(min=1)
    low, high = bounds
    rho = bounded_exp(logs)
    return mask & (rho >= low) & (rho <= high)


def _log_ratios(old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, (old_logprobs - sampler_logprobs).detach(), 0.0)
