"""Who answered, what it takes and how long it took: the parts that every reply shares, read and checked."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from enum import Enum

from ppod.errors import FailedPrecondition, InvalidReply
from ppod.v1 import common_pb2, generation_pb2


class Priority(Enum):
    """Who goes first among the requests of one team."""

    LOW = common_pb2.PRIORITY_LOW
    NORMAL = common_pb2.PRIORITY_NORMAL
    HIGH = common_pb2.PRIORITY_HIGH


@dataclass(frozen=True, slots=True)
class ModelState:
    """Which model, weights and tokenizer produced a reply."""

    model: str
    weight_version: int
    tokenizer_fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a served model takes. Lengths are in tokens."""

    vocab_size: int
    max_sequence_tokens: int
    max_request_sequences: int
    dtype: str
    device: str


class SeedPromise(Enum):
    """What a generation service promises of seeds; see generation.proto. UNKNOWN: it does not tell, or is no such."""

    UNKNOWN = generation_pb2.SEED_PROMISE_UNSPECIFIED
    EVERY_REPLICA = generation_pb2.SEED_PROMISE_EVERY_REPLICA
    UNINTERRUPTED = generation_pb2.SEED_PROMISE_UNINTERRUPTED


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Identity and limits of a served model.

    `eos_token_ids` is empty, and `seed_promise` UNKNOWN, where they have no meaning.
    """

    state: ModelState
    limits: ModelLimits
    eos_token_ids: tuple[int, ...] = ()
    seed_promise: SeedPromise = SeedPromise.UNKNOWN


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the server's time for one request went.

    A request that was split carries the longest `queue_s` of its parts, and the sums of `compute_s` and `tokens`.
    """

    queue_s: float
    compute_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Pin:
    """What a client insists on in every request; None and empty mean anything."""

    model: str = ""
    weight_version: int | None = None
    tokenizer_fingerprint: str = ""

    def to_proto(self) -> common_pb2.ModelSelector:
        """As the message that travels."""
        return common_pb2.ModelSelector(
            model=self.model, weight_version=self.weight_version, tokenizer_fingerprint=self.tokenizer_fingerprint
        )


def new_request_id() -> str:
    """A request id that no other request has."""
    return uuid.uuid4().hex


def read_state(message: common_pb2.ModelState) -> ModelState:
    """The identity of a reply."""
    return ModelState(message.model, message.weight_version, message.tokenizer_fingerprint)


def check_state(message: common_pb2.ModelState, pin: Pin) -> ModelState:
    """Turn a reply's identity into a ModelState; raise FailedPrecondition where it is not what the pin insists on."""
    state = read_state(message)
    version = state.weight_version if pin.weight_version is None else pin.weight_version
    for what, found, wanted in (
        ("model", state.model, pin.model or state.model),
        ("weight_version", str(state.weight_version), str(version)),
        ("tokenizer", state.tokenizer_fingerprint, pin.tokenizer_fingerprint or state.tokenizer_fingerprint),
    ):
        if found != wanted:
            raise FailedPrecondition(what, found, wanted)
    return state


def read_timing(message: common_pb2.Timing) -> Timing:
    """The timing of a reply; raise InvalidReply for seconds that cannot be."""
    for field, seconds in (("timing.queue_s", message.queue_s), ("timing.compute_s", message.compute_s)):
        if not math.isfinite(seconds) or seconds < 0:
            raise InvalidReply(field, str(seconds), "finite seconds, at least 0")
    return Timing(message.queue_s, message.compute_s, message.tokens)


def join_timings(timings: list[Timing]) -> Timing:
    """The timing of a request from those of its parts."""
    return Timing(
        queue_s=max(timing.queue_s for timing in timings),
        compute_s=sum(timing.compute_s for timing in timings),
        tokens=sum(timing.tokens for timing in timings),
    )


def read_limits(message: common_pb2.ModelLimits) -> ModelLimits:
    """The limits of a described model."""
    return ModelLimits(
        message.vocab_size,
        message.max_sequence_tokens,
        message.max_request_sequences,
        message.dtype,
        message.device,
    )
