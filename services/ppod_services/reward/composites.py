"""Rewards made of other rewards: ensembles and weighted sums. Pure: the members' scores come from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ppod.tensors import FloatArray
from ppod_services.reward.kinds import EnsembleConfig, SumConfig
from ppod_services.reward.samples import Query
from ppod_services.reward.scored import Adjustment, Kind, RawScores, Scored, adjusted, as_scores

Combine = Callable[[Sequence[FloatArray]], FloatArray]


def score_ensemble(config: EnsembleConfig, members: Sequence[Scored], query: Query) -> Scored:
    """mean - pessimism * std over the members (Coste et al. 2023), with both; std divides by their number."""
    scores = [member.scores for member in members]
    pessimism = config.pessimism
    return _composed(
        config,
        Kind.ENSEMBLE,
        members,
        query,
        combine=lambda parts: as_scores(_mean(parts) - pessimism * _std(parts)),
        mean=as_scores(_mean(scores)),
        std=as_scores(_std(scores)),
    )


def score_sum(config: SumConfig, members: Sequence[Scored], query: Query) -> Scored:
    """Weighted sum of the terms, added in float64 in the order of the configuration."""
    weights = tuple(term.weight for term in config.terms)

    def combine(parts: Sequence[FloatArray]) -> FloatArray:
        terms = [weight * part.astype(np.float64) for weight, part in zip(weights, parts, strict=True)]
        return as_scores(np.add.reduce(terms))

    return _composed(config, Kind.SUM, members, query, combine=combine, weights=weights)


def _composed(
    config: EnsembleConfig | SumConfig,
    kind: Kind,
    members: Sequence[Scored],
    query: Query,
    *,
    combine: Combine,
    mean: FloatArray | None = None,
    std: FloatArray | None = None,
    weights: tuple[float, ...] = (),
) -> Scored:
    raw = RawScores(combine([member.scores for member in members]), _combine_ways(members, combine))
    adjustment = Adjustment.of(config)
    done = adjusted(raw, adjustment, [sample.index for sample in query.samples], config.name)
    return Scored(
        name=config.name,
        kind=kind,
        scores=done.scores,
        raw=None if adjustment is None else raw.scores,
        adjustment=adjustment,
        way=done.way,
        mean=mean,
        std=std,
        pessimism=config.pessimism if isinstance(config, EnsembleConfig) else 0.0,
        members=tuple(members),
        weights=weights,
        truncated=_most_truncated(members),
    )


def _combine_ways(members: Sequence[Scored], combine: Combine) -> tuple[FloatArray, ...] | None:
    ways = [member.way for member in members if member.way is not None]
    if not ways:
        return None
    # Every member was asked at the same positions.
    return tuple(combine(parts) for parts in zip(*ways, strict=True))


def _most_truncated(members: Sequence[Scored]) -> tuple[int, ...]:
    cut = [member.truncated for member in members if member.truncated]
    return tuple(max(lost) for lost in zip(*cut, strict=True))


def _mean(parts: Sequence[FloatArray]) -> np.ndarray:
    return np.mean(np.stack(parts).astype(np.float64), axis=0)


def _std(parts: Sequence[FloatArray]) -> np.ndarray:
    return np.std(np.stack(parts).astype(np.float64), axis=0)
