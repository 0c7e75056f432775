"""How scores came about: the tree of rewards in a reply, checked, and joined from the parts of a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from ppod.client.identity import ModelLimits, ModelState, read_limits, read_state
from ppod.errors import InvalidReply
from ppod.tensors import FloatArray, unpack_reply_floats
from ppod.v1 import reward_pb2


class RewardKind(Enum):
    """What computes a reward."""

    MODEL = reward_pb2.REWARD_KIND_MODEL
    PROCESS_MODEL = reward_pb2.REWARD_KIND_PROCESS_MODEL
    FUNCTION = reward_pb2.REWARD_KIND_FUNCTION
    JUDGE = reward_pb2.REWARD_KIND_JUDGE
    ENSEMBLE = reward_pb2.REWARD_KIND_ENSEMBLE
    SUM = reward_pb2.REWARD_KIND_SUM


@dataclass(frozen=True, slots=True)
class ScoreAdjustment:
    """score = clip((raw - mean) / std, clip_low, clip_high); a bound that is None does not clip."""

    mean: float
    std: float
    clip_low: float | None
    clip_high: float | None


@dataclass(frozen=True, slots=True, eq=False)
class RewardComponent:
    """One reward's part in the scores of a request; the root is the reward that was asked for.

    Attributes:
        name, kind: what it is.
        weight: its factor in the sum above it; None where it is no term of a sum.
        scores: float32 [sequences], normalised and clipped, finite.
        raw_scores: float32 [sequences], before that; None where neither is configured.
        adjustment: what was configured; None where nothing was.
        std, mean: of an ensemble's members, float32 [sequences], std divided by their number; None elsewhere.
        pessimism: k of an ensemble's mean - k * std.
        members: of an ensemble, or terms of a sum.
        state: model and weights; None where no model of the server computed it.
        truncated_tokens: tokens dropped from each sequence.
    """

    name: str
    kind: RewardKind
    weight: float | None
    scores: FloatArray
    raw_scores: FloatArray | None
    adjustment: ScoreAdjustment | None
    std: FloatArray | None
    mean: FloatArray | None
    pessimism: float
    members: tuple[RewardComponent, ...]
    state: ModelState | None
    truncated_tokens: tuple[int, ...]

    @property
    def versions(self) -> tuple[int, ...]:
        """Weight versions of all models below, in the order of the tree."""
        own = () if self.state is None else (self.state.weight_version,)
        return own + tuple(version for member in self.members for version in member.versions)

    @property
    def signature(self) -> str:
        """All that does not depend on the sequences or on weight versions, as text."""
        model = "" if self.state is None else f"@{self.state.model}/{self.state.tokenizer_fingerprint}"
        settings = f"{self.weight},{self.adjustment},{self.pessimism}"
        return f"{self.name}{model}:{self.kind.name}({settings})[{', '.join(m.signature for m in self.members)}]"


@dataclass(frozen=True, slots=True)
class RewardDescription:
    """What a reward is.

    Attributes:
        name: what requests call it.
        kind: what computes it.
        adjustment: how its scores are put on a common scale; None where they are left raw.
        members: names of an ensemble's members or of a sum's terms.
        weights: factors of a sum's terms, in the order of `members`.
        pessimism: k of an ensemble's mean - k * std.
        state, limits: of its model; None where no model of the server computes it.
        takes_tokens: whether it takes token ids.
        needs_references: whether it needs an answer to check against.
    """

    name: str
    kind: RewardKind
    adjustment: ScoreAdjustment | None
    members: tuple[str, ...]
    weights: tuple[float, ...]
    pessimism: float
    state: ModelState | None
    limits: ModelLimits | None
    takes_tokens: bool
    needs_references: bool


def read_component(message: reward_pb2.RewardComponent, count: int, path: str = "breakdown") -> RewardComponent:
    """Check and read a component for `count` sequences, and all below it.

    Raises:
        InvalidReply: an array has another length or a value that is not finite, a term of a sum has no weight, an
            ensemble no statistics; `field` is the path to it.
    """
    kind = _read_kind(message.kind, path)
    ensemble = kind is RewardKind.ENSEMBLE
    if kind in (RewardKind.ENSEMBLE, RewardKind.SUM) and not message.members:
        raise InvalidReply(f"{path}.members", "none", f"the members of {kind.name}")
    truncated = tuple(message.truncated_tokens) or (0,) * count
    if len(truncated) != count:
        raise InvalidReply(f"{path}.truncated_tokens", f"{len(truncated)} values", f"{count} or none")
    members = tuple(
        read_component(member, count, f"{path}.members[{index}]") for index, member in enumerate(message.members)
    )
    if kind is RewardKind.SUM:
        for index, member in enumerate(members):
            if member.weight is None:
                raise InvalidReply(f"{path}.members[{index}].weight", "none", "the factor of this term of a sum")
    return RewardComponent(
        name=message.name,
        kind=kind,
        weight=_finite(message.weight, f"{path}.weight") if message.HasField("weight") else None,
        scores=unpack_reply_floats(message.scores, count, f"{path}.scores"),
        raw_scores=_optional(message.raw_scores, count, f"{path}.raw_scores"),
        adjustment=_read_adjustment(message.adjustment, path) if message.HasField("adjustment") else None,
        std=unpack_reply_floats(message.std, count, f"{path}.std") if ensemble else None,
        mean=unpack_reply_floats(message.mean, count, f"{path}.mean") if ensemble else None,
        pessimism=_finite(message.pessimism, f"{path}.pessimism"),
        members=members,
        state=read_state(message.model) if message.HasField("model") else None,
        truncated_tokens=truncated,
    )


def join_components(parts: Sequence[RewardComponent]) -> RewardComponent:
    """One component from those of consecutive parts of a request, which have one signature."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        scores=np.concatenate([part.scores for part in parts]),
        raw_scores=_join([part.raw_scores for part in parts]),
        std=_join([part.std for part in parts]),
        mean=_join([part.mean for part in parts]),
        members=tuple(join_components(members) for members in zip(*(part.members for part in parts), strict=True)),
        truncated_tokens=tuple(dropped for part in parts for dropped in part.truncated_tokens),
    )


def read_description(message: reward_pb2.RewardDescription, path: str) -> RewardDescription:
    """Check and read what a reward is."""
    kind = _read_kind(message.kind, path)
    if kind is RewardKind.SUM and len(message.weights) != len(message.members):
        raise InvalidReply(f"{path}.weights", f"{len(message.weights)} values", f"{len(message.members)}")
    return RewardDescription(
        name=message.name,
        kind=kind,
        adjustment=_read_adjustment(message.adjustment, path) if message.HasField("adjustment") else None,
        members=tuple(message.members),
        weights=tuple(message.weights),
        pessimism=message.pessimism,
        state=read_state(message.model) if message.HasField("model") else None,
        limits=read_limits(message.limits) if message.HasField("limits") else None,
        takes_tokens=message.takes_tokens,
        needs_references=message.needs_references,
    )


def _read_kind(value: int, path: str) -> RewardKind:
    try:
        return RewardKind(value)
    except ValueError:
        raise InvalidReply(f"{path}.kind", str(value), "a kind of reward") from None


def _read_adjustment(message: reward_pb2.ScoreAdjustment, path: str) -> ScoreAdjustment:
    std = _finite(message.std, f"{path}.adjustment.std")
    if std <= 0:
        raise InvalidReply(f"{path}.adjustment.std", str(std), "a number above 0")
    return ScoreAdjustment(
        mean=_finite(message.mean, f"{path}.adjustment.mean"),
        std=std,
        clip_low=message.clip_low if message.HasField("clip_low") else None,
        clip_high=message.clip_high if message.HasField("clip_high") else None,
    )


def _finite(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise InvalidReply(path, str(value), "a finite number")
    return value


def _optional(data: bytes, count: int, path: str) -> FloatArray | None:
    return unpack_reply_floats(data, count, path) if data else None


def _join(arrays: Sequence[FloatArray | None]) -> FloatArray | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
