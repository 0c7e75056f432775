"""From the reward model's score to what the response is paid, in this order:

    1. normalisation by running statistics (`score_statistics`): (score - shift) / scale
    2. clipping to [-clip, clip]
    3. penalties: for a missing end, for length, for coming near the longest length

so that clip and penalties are in units of the normalised score. Shape legend: B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.config import RewardsConfig
from ppod_trainer.score_statistics import ScoreStatistics


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """What normalisation does: (score - shift) / scale."""

    shift: float = 0.0
    scale: float = 1.0


def score_scale(config: RewardsConfig, statistics: ScoreStatistics) -> ScoreScale:
    """The normalisation that the configuration names, by the statistics so far."""
    match config.normalize:
        case "none":
            return ScoreScale()
        case "scale":
            return ScoreScale(scale=statistics.std)
        case "whiten":
            return ScoreScale(statistics.mean, statistics.std)


def shape_scores(
    scores: torch.Tensor, truncated: torch.Tensor, lengths: torch.Tensor, config: RewardsConfig, scale: ScoreScale
) -> torch.Tensor:
    """What each response is paid, float32 [B].

    Args:
        scores: float32 [B], the reward model's.
        truncated: bool [B], cut off at a limit.
        lengths: int64 [B], action tokens.
        config: clip and penalties.
        scale: the normalisation.
    """
    shaped = normalised(scores, config, scale)
    shaped = shaped - config.missing_eos_penalty * truncated.to(shaped.dtype)
    if config.length_penalty is not None:
        shaped = shaped - length_penalty(lengths, config.length_penalty.budget_tokens, config.length_penalty.per_token)
    if config.overlong is not None:
        one = config.overlong
        shaped = shaped - one.penalty * overlong_penalty(lengths, one.max_tokens, one.cache_tokens)
    return shaped


def normalised(scores: torch.Tensor, config: RewardsConfig, scale: ScoreScale) -> torch.Tensor:
    """Scores, or potentials, of any shape, after normalisation and clipping."""
    found = (scores - scale.shift) / scale.scale
    return found if config.clip is None else found.clamp(-config.clip, config.clip)


def length_penalty(lengths: torch.Tensor, budget_tokens: int, per_token: float) -> torch.Tensor:
    """per_token for each token above the budget, float32 [B], >= 0."""
    return per_token * (lengths - budget_tokens).clamp(min=0).float()


def overlong_penalty(lengths: torch.Tensor, max_tokens: int, cache_tokens: int) -> torch.Tensor:
    """Soft overlong punishment, float32 [B] in [0, 1] (Yu et al. 2025, DAPO, equation 13, negated).

    0 up to max_tokens - cache_tokens, rising in a straight line to 1 at max_tokens, and 1 beyond.
    """
    return ((lengths - (max_tokens - cache_tokens)).float() / cache_tokens).clamp(0, 1)
