"""Requests that several tests of generation share."""

from __future__ import annotations

from ppod import Sampling
from support.sampling_reference import Rules

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [5, 6, 7]]
SEEDS = [1, 2, 3, 4, 2**64 - 1]


def rules_of(sampling: Sampling) -> Rules:
    """How a request's tokens are drawn."""
    return Rules(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
    )
