"""Token rewards: the KL penalty on every action token, the score on the last, an environment's rewards where paid."""

from __future__ import annotations

import torch


def token_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor | None,
    mask: torch.Tensor,
    kl_coefficient: float,
    turn_rewards: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rewards float32 [B, T]: -kl_coefficient * kl on each action token, turn_rewards, plus the score on the last one.

    Args:
        scores: float32 [B].
        kl: float32 [B, T], an estimate for each token; None where the penalty is in the loss.
        mask: bool [B, T]; true on action tokens, at least one in every row.
        kl_coefficient: >= 0.
        turn_rewards: float32 [B, T], on action tokens; None: there are none.
    """
    rewards = torch.zeros(mask.shape, dtype=torch.float32, device=scores.device)
    if kl is not None:
        rewards = torch.where(mask, -kl_coefficient * kl, rewards)
    if turn_rewards is not None:
        rewards = rewards + turn_rewards
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, scores.float().unsqueeze(1))
