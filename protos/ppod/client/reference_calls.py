"""What ReferenceService is asked, and how its replies are checked; free of I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import (
    ModelDescription,
    ModelState,
    Pin,
    Priority,
    Timing,
    check_state,
    join_timings,
    new_request_id,
    read_limits,
    read_timing,
)
from ppod.client.jobs import Answerer
from ppod.client.splitting import RowSizes
from ppod.errors import InvalidArgument, InvalidReply
from ppod.tensors import FloatArray, TokenArray, pack_sequences, split_ragged, unpack_reply_floats, unpack_reply_tokens
from ppod.v1 import reference_pb2

REFERENCE_SERVICE = "ppod.v1.ReferenceService"


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most probable tokens at each response token, the most probable first.

    Attributes:
        token_ids: for each sequence int32 [length - prompt_length, top_k].
        logprobs: for each sequence float32 [length - prompt_length, top_k], natural log, finite.
    """

    token_ids: list[TokenArray]
    logprobs: list[FloatArray]


@dataclass(frozen=True, slots=True)
class ReferenceLogprobs:
    """Logprobs of one request.

    Attributes:
        values: for each sequence float32 [length - prompt_length], natural log, finite.
        state: which model answered.
        timing: where the server's time went.
        entropies: for each sequence float32 [length - prompt_length], nats; None unless asked for.
        top: the most probable tokens; None unless asked for.
    """

    values: list[FloatArray]
    state: ModelState
    timing: Timing
    entropies: list[FloatArray] | None = None
    top: TopTokens | None = None


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """What is asked besides; see `ReferenceClient.logprobs`."""

    temperature: float = 1.0
    entropy: bool = False
    top_k: int = 0
    priority: Priority = Priority.NORMAL
    request_id: str = ""


class LogprobJob:
    """Computes logprobs of the response tokens of sequences."""

    method = f"/{REFERENCE_SERVICE}/ComputeLogprobs"
    input_field = "tokens"
    repeatable = True

    def __init__(
        self, sequences: Sequence[npt.ArrayLike], prompt_lengths: Sequence[int], options: LogprobOptions, pin: Pin
    ) -> None:
        if len(prompt_lengths) != len(sequences):
            raise InvalidArgument(
                "prompt_lengths", f"{len(prompt_lengths)} values", f"{len(sequences)}, one for each sequence"
            )
        tokens = pack_sequences(sequences)
        lengths = list(tokens.lengths)
        self._counts = [max(0, length - prompt) for length, prompt in zip(lengths, prompt_lengths, strict=True)]
        reply_bytes = 4 + 4 * options.entropy + 8 * options.top_k
        wire = [max(4 * length, reply_bytes * count) for length, count in zip(lengths, self._counts, strict=True)]
        self.sizes = RowSizes(lengths, wire)
        self._pin = pin
        self._request = reference_pb2.ComputeLogprobsRequest(
            request_id=options.request_id or new_request_id(),
            selector=pin.to_proto(),
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            temperature=options.temperature,
            entropy=options.entropy,
            top_k=options.top_k,
            priority=options.priority.value,
        )
        self._parts: dict[int, ReferenceLogprobs] = {}

    def encode(self, rows: range, part: int | None) -> bytes:
        """The request for some of the sequences."""
        whole = self._request
        if part is None:
            return whole.SerializeToString()
        lengths = whole.tokens.lengths[rows.start : rows.stop]
        start = 4 * sum(whole.tokens.lengths[: rows.start])
        cut = reference_pb2.ComputeLogprobsRequest(
            request_id=f"{whole.request_id}/{part}",
            selector=whole.selector,
            prompt_lengths=whole.prompt_lengths[rows.start : rows.stop],
            temperature=whole.temperature,
            entropy=whole.entropy,
            top_k=whole.top_k,
            priority=whole.priority,
        )
        cut.tokens.token_ids = whole.tokens.token_ids[start : start + 4 * sum(lengths)]
        cut.tokens.lengths.extend(lengths)
        return cut.SerializeToString()

    def accept(self, rows: range, data: bytes) -> Answerer:
        """Check and keep a reply."""
        reply = parse(reference_pb2.ComputeLogprobsResponse, data)
        counts = self._counts[rows.start : rows.stop]
        total = sum(counts)
        values = split_ragged(unpack_reply_floats(reply.logprobs, total, "logprobs"), counts)
        entropies = unpack_reply_floats(reply.entropies, total if self._request.entropy else 0, "entropies")
        if len(entropies) and entropies.min() < 0:
            raise InvalidReply("entropies", f"{entropies.min()}", "no entropy below 0")
        state = check_state(reply.model, self._pin)
        self._parts[rows.start] = ReferenceLogprobs(
            values,
            state,
            read_timing(reply.timing),
            split_ragged(entropies, counts) if self._request.entropy else None,
            self._read_top(reply, counts),
        )
        return Answerer(state, (state.weight_version,))

    def forget(self) -> None:
        """Drop the replies kept so far."""
        self._parts.clear()

    def result(self) -> ReferenceLogprobs:
        """All parts as one."""
        parts = [self._parts[start] for start in sorted(self._parts)]
        if len(parts) == 1:
            return parts[0]
        entropies = [each for part in parts for each in part.entropies or ()]
        tops = [part.top for part in parts if part.top is not None]
        return replace(
            parts[0],
            values=[each for part in parts for each in part.values],
            timing=join_timings([part.timing for part in parts]),
            entropies=entropies if self._request.entropy else None,
            top=TopTokens(
                token_ids=[each for top in tops for each in top.token_ids],
                logprobs=[each for top in tops for each in top.logprobs],
            )
            if tops
            else None,
        )

    def _read_top(self, reply: reference_pb2.ComputeLogprobsResponse, counts: Sequence[int]) -> TopTokens | None:
        top_k = self._request.top_k
        total = top_k * sum(counts)
        logprobs = unpack_reply_floats(reply.top_logprobs, total, "top_logprobs")
        if len(reply.top_token_ids) != 4 * total:
            found = f"{len(reply.top_token_ids)} bytes"
            raise InvalidReply("top_token_ids", found, f"{4 * total} bytes, 4 for each of {total} values")
        if not total:
            return None
        ids = unpack_reply_tokens(reply.top_token_ids, "top_token_ids")
        if ids.min() < 0:
            raise InvalidReply("top_token_ids", str(ids.min()), "ids of 0 and above")
        table = logprobs.reshape(-1, top_k)
        if (np.diff(table, axis=1) > 0).any():
            raise InvalidReply("top_logprobs", "a less probable token before a more probable one", "descending ones")
        return TopTokens(
            [each.reshape(-1, top_k) for each in split_ragged(ids, [top_k * count for count in counts])],
            [each.reshape(-1, top_k) for each in split_ragged(logprobs, [top_k * count for count in counts])],
        )


def compute(core: ClientCore, job: LogprobJob, timeout_s: float | None) -> Program[ReferenceLogprobs]:
    """Deliver a job and put its parts together."""
    yield from core.deliver(job, lambda left_s: describe(core, left_s), timeout_s)
    return job.result()


def describe(core: ClientCore, timeout_s: float | None) -> Program[ModelDescription]:
    """Ask which model is served and what it takes."""
    request = reference_pb2.GetReferenceModelRequest(selector=core.pin.to_proto())
    job = SingleJob(f"/{REFERENCE_SERVICE}/GetReferenceModel", request)
    yield from core.ask(job, timeout_s)
    reply = parse(reference_pb2.GetReferenceModelResponse, job.reply)
    return core.learn(ModelDescription(check_state(reply.model, core.pin), read_limits(reply.limits)))
