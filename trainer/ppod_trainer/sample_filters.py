"""Samples that are never trained on: unsafe, degenerate, or too short to say anything. Each reason is counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np

from ppod.tensors import TokenArray
from ppod_trainer.config import FiltersConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.rounding import reaches

log = logging.getLogger(__name__)

REASONS = ("short", "repetitive", "unsafe")


def keep_trainable(
    rollouts: Sequence[ScoredRollout], config: FiltersConfig, step: int
) -> tuple[list[ScoredRollout], dict[str, int]]:
    """The samples that no filter rejects, and how many were rejected for each of `REASONS`; a line in the log tells.

    Raises:
        TrainerError: a score or an environment's reward is not finite, or the safety reward is no part of the scores.
    """
    kept: list[ScoredRollout] = []
    counts: dict[str, int] = dict.fromkeys(REASONS, 0)
    for number, one in enumerate(rollouts):
        if not math.isfinite(one.score):
            raise TrainerError(
                f"step {step}, sample {number}: the score is {one.score}; expected a finite number; look at the reward "
                "service's log"
            )
        if not np.isfinite(one.rollout.rewards).all():
            paid = one.rollout.rewards[~np.isfinite(one.rollout.rewards)][0]
            raise TrainerError(
                f"step {step}, sample {number} (seed {one.rollout.seed}): the environment paid {paid}; expected finite "
                "rewards; look at what its step returns"
            )
        reason = rejection(one, config)
        if reason is None:
            kept.append(one)
        else:
            counts[reason] += 1
    if len(kept) < len(rollouts):
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        log.warning(
            "step %d: %d of %d samples are not trained on: %s", step, len(rollouts) - len(kept), len(rollouts), reasons
        )
    return kept, counts


def rejection(scored: ScoredRollout, config: FiltersConfig) -> str | None:
    """The first of `REASONS` that a sample is rejected for; None: it may be trained on."""
    tokens = scored.rollout.response[scored.rollout.action_mask]
    if config.min_tokens is not None and len(tokens) < config.min_tokens:
        return "short"
    if config.max_repetition is not None and repetition(tokens, config.repetition_ngram) > config.max_repetition:
        return "repetitive"
    safety = config.safety
    if safety is not None:
        if safety.reward not in scored.components:
            raise TrainerError(no_part(safety.reward, scored.components))
        if not reaches(scored.components[safety.reward], safety.at_least):
            return "unsafe"
    return None


def no_part(safety_reward: str, parts: Iterable[str]) -> str:
    """What is wrong where a score has other parts than the one that the safety filter reads."""
    return (
        f"rewards.filters.safety.reward is {safety_reward!r}, which is no part of the scores (their parts: "
        f"{', '.join(sorted(parts)) or 'none'}); name one of them, or make it a term of the reward, with weight 0 if "
        "it is not to be paid"
    )


def repetition(tokens: TokenArray, n: int) -> float:
    """Share of a response's n-grams that stood in it before, in [0, 1); 0 where there is none."""
    if len(tokens) < n:
        return 0.0
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    # Not 1 less the share of the others: 1 - 0.7 is more than 0.3, which a bound may be.
    return (len(ngrams) - len(np.unique(ngrams, axis=0))) / len(ngrams)
