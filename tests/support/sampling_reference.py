"""The distribution that a token is drawn from, by its definition: plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Rules:
    """As `ppod.Sampling`, as far as one token is concerned."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])


def shaped_logits(logits: npt.ArrayLike, rules: Rules, held: Iterable[int]) -> npt.NDArray[np.float64]:
    """Logits [V] after bias and penalty, given the tokens of prompt and completion so far."""
    shaped = [float(value) for value in np.asarray(logits)]
    for token, value in rules.logit_bias.items():
        shaped[token] += value
    for token in set(held):
        if shaped[token] > 0:
            shaped[token] /= rules.repetition_penalty
        else:
            shaped[token] *= rules.repetition_penalty
    return np.asarray(shaped)


def reference_distribution(logits: npt.ArrayLike, rules: Rules, held: Iterable[int] = ()) -> npt.NDArray[np.float64]:
    """Probabilities [V]. Greedy: those that the logprob is told of; the likeliest is what is drawn."""
    shaped = shaped_logits(logits, rules, held)
    greedy = rules.temperature == 0
    scaled = shaped if greedy else shaped / rules.temperature
    largest = max(scaled)
    weights = [math.exp(value - largest) for value in scaled]
    if greedy:
        return np.asarray(weights) / sum(weights)
    least = rules.min_p * max(weights)
    kept = [weight if weight >= least else 0.0 for weight in weights]
    order = sorted(range(len(kept)), key=lambda token: -kept[token])
    if rules.top_k:
        for token in order[rules.top_k :]:
            kept[token] = 0.0
    mass, before = sum(kept), 0.0
    for token in order:
        share = kept[token]
        if before >= rules.top_p * mass:
            kept[token] = 0.0
        before += share
    return np.asarray(kept) / sum(kept)
