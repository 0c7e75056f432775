"""Scores with all that a reply tells about them. Free of torch and of protobuf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce

import numpy as np
import numpy.typing as npt

from ppod.errors import NonFiniteOutput
from ppod.tensors import FloatArray
from ppod_services.reward.kinds import NamedReward, NormalizationConfig


def as_scores(values: npt.ArrayLike) -> FloatArray:
    """float32; what that cannot hold becomes infinite, which `adjusted` refuses with the sample's name."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32)


class Kind(Enum):
    """What computes a reward; the numbers of `ppod.v1.RewardKind`."""

    MODEL = 1
    PROCESS_MODEL = 2
    FUNCTION = 3
    JUDGE = 4
    ENSEMBLE = 5
    SUM = 6


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What puts raw scores on a common scale: clip((raw - mean) / std, low, high)."""

    mean: float = 0.0
    std: float = 1.0
    clip_low: float | None = None
    clip_high: float | None = None

    @classmethod
    def of(cls, config: NamedReward) -> Adjustment | None:
        """The adjustment that a reward is configured with; None where its scores stay raw."""
        if config.normalization is None and config.clip is None:
            return None
        scale = config.normalization or NormalizationConfig(mean=0.0, std=1.0)
        clip = config.clip
        return cls(scale.mean, scale.std, clip and clip.low, clip and clip.high)

    def apply(self, raw: FloatArray) -> FloatArray:
        """Adjusted scores, float32 of raw's shape; computed in float64."""
        scores = (raw.astype(np.float64) - self.mean) / self.std
        if self.clip_low is not None or self.clip_high is not None:
            scores = np.clip(scores, self.clip_low, self.clip_high)
        return as_scores(scores)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model and weights answered; the fingerprint is empty where no tokenizer was needed."""

    name: str
    weight_version: int
    tokenizer_fingerprint: str


@dataclass(frozen=True, slots=True)
class Work:
    """Where the time went.

    Attributes:
        queue_s: seconds until the first batch began; None where no model was asked.
        batch_s: seconds of each batch of the models' queue, by its number.
        tokens: tokens that models processed, padding left out.
        elsewhere_s: seconds that functions and judges took.
    """

    queue_s: float | None = None
    batch_s: dict[int, float] = field(default_factory=dict[int, float])
    tokens: int = 0
    elsewhere_s: float = 0.0

    def plus(self, other: Work) -> Work:
        """The work of two rewards that ran side by side."""
        waits = [wait for wait in (self.queue_s, other.queue_s) if wait is not None]
        batches = dict(self.batch_s)
        for number, seconds in other.batch_s.items():
            batches[number] = max(seconds, batches.get(number, 0.0))
        return Work(
            min(waits, default=None),
            batches,
            self.tokens + other.tokens,
            max(self.elsewhere_s, other.elsewhere_s),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One reward's scores of a request, and those of its members.

    Attributes:
        name, kind: which reward it is.
        scores: float32 [sequences], finite, adjusted.
        raw: the same before the adjustment; None where there is none.
        adjustment: what was configured.
        way: adjusted scores at the positions asked for, float32 [positions] for each sequence; None: not asked for.
        mean, std: over an ensemble's members, float32 [sequences]; None elsewhere.
        pessimism: k of an ensemble's mean - k * std.
        members: what it is composed of.
        weights: factors of the terms of a sum, one for each member; empty elsewhere.
        model: who computed it; None where no model of this server did.
        truncated: tokens dropped from each sequence; empty where none was.
        work: where the time went, members left out.
    """

    name: str
    kind: Kind
    scores: FloatArray
    raw: FloatArray | None
    adjustment: Adjustment | None
    way: tuple[FloatArray, ...] | None = None
    mean: FloatArray | None = None
    std: FloatArray | None = None
    pessimism: float = 0.0
    members: tuple[Scored, ...] = ()
    weights: tuple[float, ...] = ()
    model: ModelIdentity | None = None
    truncated: tuple[int, ...] = ()
    work: Work = field(default_factory=Work)


def total_work(scored: Scored) -> Work:
    """Where the time of a reward and all its members went; one that is a member twice was computed once."""
    return reduce(Work.plus, (part.work for part in {part.name: part for part in _parts(scored)}.values()))


@dataclass(frozen=True, slots=True, eq=False)
class RawScores:
    """What a reward computed, before its adjustment."""

    scores: FloatArray
    way: tuple[FloatArray, ...] | None


def adjusted(raw: RawScores, adjustment: Adjustment | None, indexes: Sequence[int], name: str) -> RawScores:
    """Apply an adjustment to scores and way; raise NonFiniteOutput where a score is not finite before or after it."""
    scores = _checked(raw.scores, adjustment, indexes, name)
    if raw.way is None:
        return RawScores(scores, None)
    way = tuple(
        _checked(one, adjustment, [index] * len(one), name) for one, index in zip(raw.way, indexes, strict=True)
    )
    return RawScores(scores, way)


def _parts(scored: Scored) -> Iterator[Scored]:
    yield scored
    for member in scored.members:
        yield from _parts(member)


def _checked(raw: FloatArray, adjustment: Adjustment | None, indexes: Sequence[int], name: str) -> FloatArray:
    # Before the adjustment too: clipping would make a number of an infinity.
    scores = raw if adjustment is None else adjustment.apply(raw)
    finite = np.isfinite(raw) & np.isfinite(scores)
    if not finite.all():
        position = int(finite.argmin())
        found = raw[position] if not np.isfinite(raw[position]) else scores[position]
        raise NonFiniteOutput(f"score of {name!r}", indexes[position], str(found))
    return scores
