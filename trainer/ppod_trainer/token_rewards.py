"""Token rewards: the score on the last response token, the KL penalty on every one."""

from __future__ import annotations

import torch


def shape_scores(
    scores: torch.Tensor, truncated: torch.Tensor, *, clip: float | None, missing_eos_penalty: float
) -> torch.Tensor:
    """Clip scores [B], then take the penalty off those whose response was cut off (truncated: bool [B])."""
    shaped = scores if clip is None else scores.clamp(-clip, clip)
    return shaped - missing_eos_penalty * truncated.to(shaped.dtype)


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor | None, mask: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """Rewards float32 [B, T]: -kl_coefficient * kl on each response token, plus the score on the last one.

    Args:
        scores: float32 [B].
        kl: float32 [B, T], an estimate for each token; None where the penalty is in the loss.
        mask: bool [B, T]; every row has at least one true, without holes.
        kl_coefficient: >= 0.
    """
    rewards = torch.zeros(mask.shape, dtype=torch.float32, device=scores.device)
    if kl is not None:
        rewards = torch.where(mask, -kl_coefficient * kl, rewards)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.float().unsqueeze(1))
