"""What a served model is, as servicers tell it and hold requests against it. Free of torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ppod.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from ppod.tensors import TokenArray, check_token_ids, unpack_sequences
from ppod.v1 import common_pb2
from ppod_services.core.config import LimitsConfig
from ppod_services.core.scheduler import Outcome
from ppod_services.core.tracing import annotate_span

LoadedT = TypeVar("LoadedT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity and bounds of a loaded model.

    Attributes:
        name: what requests call it.
        tokenizer_fingerprint: see `ppod_models.loading.tokenizer_fingerprint`.
        vocab_size: valid ids are 0 to vocab_size - 1.
        max_sequence_tokens: longest sequence, prompt and response together.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda:0" and so on.
        eos_token_ids: the model's own end-of-sequence ids.
        packs: whether it runs sequences one after the other, without padding.
        special_tokens: ids of the tokens that have no text, by what stands for them in prompts.
    """

    name: str
    tokenizer_fingerprint: str
    vocab_size: int
    max_sequence_tokens: int
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...] = ()
    packs: bool = False
    special_tokens: Mapping[str, int] = field(default_factory=dict[str, int])

    def state(self, weight_version: int) -> common_pb2.ModelState:
        """Identity as the message that travels."""
        return common_pb2.ModelState(
            model=self.name, weight_version=weight_version, tokenizer_fingerprint=self.tokenizer_fingerprint
        )

    def limits(self, max_request_sequences: int) -> common_pb2.ModelLimits:
        """Bounds as the message that travels."""
        return common_pb2.ModelLimits(
            vocab_size=self.vocab_size,
            max_sequence_tokens=self.max_sequence_tokens,
            max_request_sequences=max_request_sequences,
            dtype=self.dtype,
            device=self.device,
        )


class Deferred(Generic[LoadedT]):
    """Something that a server has only once its model is loaded."""

    def __init__(self) -> None:
        self._value: LoadedT | None = None
        self._lock = threading.Lock()

    def set(self, value: LoadedT) -> None:
        """Make the value available; from any thread."""
        with self._lock:
            self._value = value

    def get(self) -> LoadedT:
        """The value; raise Unavailable while it is not there yet."""
        with self._lock:
            if self._value is None:
                raise Unavailable("the model is still being loaded")
            return self._value


def check_model(selector: common_pb2.ModelSelector, names: Sequence[str]) -> str:
    """The name of the model that a selector asks for, the first one by default; raise NotFound for another."""
    if not selector.model:
        return names[0]
    if selector.model not in names:
        raise NotFound("model", selector.model, f"this server has {', '.join(names)}")
    return selector.model


def check_tokenizer(info: ModelInfo, selector: common_pb2.ModelSelector) -> None:
    """Raise FailedPrecondition when the selector insists on another tokenizer."""
    wanted = selector.tokenizer_fingerprint
    if wanted and wanted != info.tokenizer_fingerprint:
        raise FailedPrecondition("tokenizer", info.tokenizer_fingerprint, wanted)


def pinned_version(selector: common_pb2.ModelSelector, serving: int) -> int | None:
    """The weight version that a selector insists on, or None; raise FailedPrecondition when another one serves."""
    if not selector.HasField("weight_version"):
        return None
    check_version(selector.weight_version, serving)
    return selector.weight_version


def check_version(pinned: int | None, serving: int) -> None:
    """Raise FailedPrecondition when another version serves than the pinned one."""
    if pinned is not None and pinned != serving:
        raise FailedPrecondition("weight_version", str(serving), str(pinned))


def read_sequences(message: common_pb2.TokenSequences, field: str, info: ModelInfo, most: int) -> list[TokenArray]:
    """Unpack the sequences of a request and check their number and ids, but not their lengths.

    Raises:
        InvalidArgument: none or too many sequences, bytes that do not add up, an id out of range.
    """
    check_count(len(message.lengths), field, most)
    sequences = unpack_sequences(message, field)
    check_token_ids(sequences, info.vocab_size, field)
    return sequences


def check_count(count: int, field: str, most: int) -> None:
    """Raise InvalidArgument unless a request holds 1 to `most` sequences."""
    if not 1 <= count <= most:
        raise InvalidArgument(field, f"{count} sequences", f"1 to {most} sequences")


def check_length(sample: int, length: int, field: str, most: int) -> None:
    """Raise InvalidArgument, which names `field`, when a sequence is longer than `most` tokens."""
    if length > most:
        raise InvalidArgument(field, f"{length} tokens", f"at most {most} tokens", sample)


def effective_deadline_s(time_remaining_s: float | None, limits: LimitsConfig) -> float:
    """Seconds that a call may take: the caller's deadline, or the default where it set none."""
    return limits.default_deadline_s if time_remaining_s is None else time_remaining_s


def request_timing(outcomes: Sequence[Outcome[ResultT]], tokens: int) -> common_pb2.Timing:
    """Timing of a whole request: the wait for its first batch, the time of all batches that held a part of it."""
    seconds: dict[int, float] = {}
    for outcome in outcomes:
        seconds[outcome.batch] = max(outcome.compute_s, seconds.get(outcome.batch, 0.0))
    queue_s = min(outcome.queue_s for outcome in outcomes)
    timing = common_pb2.Timing(queue_s=queue_s, compute_s=sum(seconds.values()), tokens=tokens)
    annotate_span(timing)
    return timing
