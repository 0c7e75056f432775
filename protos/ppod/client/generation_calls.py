"""What GenerationService is asked, and how its replies are checked; free of I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy.typing as npt

from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import (
    ModelDescription,
    ModelState,
    Pin,
    Priority,
    Timing,
    check_state,
    new_request_id,
    read_limits,
    read_timing,
)
from ppod.errors import FailedPrecondition, InvalidReply
from ppod.tensors import FloatArray, TokenArray, pack_sequences, unpack_reply_floats, unpack_reply_tokens
from ppod.v1 import generation_pb2

GENERATION_SERVICE = "ppod.v1.GenerationService"


class FinishReason(Enum):
    """Why a completion ended."""

    STOP = generation_pb2.FINISH_REASON_STOP
    LENGTH = generation_pb2.FINISH_REASON_LENGTH


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 keeps all tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def to_proto(self) -> generation_pb2.SamplingParams:
        """As the message that travels."""
        return generation_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Attributes:
        index: position of its prompt in the request.
        token_ids: int32 [length], the stop token included.
        logprobs: float32 [length], natural log, under the distribution that each token was drawn from.
        finish_reason: why it ended.
        seed: the seed that was used.
        state: model and weight version that sampled it.
        timing: where the server's time went.
    """

    index: int
    token_ids: TokenArray
    logprobs: FloatArray
    finish_reason: FinishReason
    seed: int
    state: ModelState
    timing: Timing


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What is asked besides prompts and sampling; see `GenerationClient.stream`."""

    seeds: Sequence[int] = ()
    weight_version: int | None = None
    priority: Priority = Priority.NORMAL
    request_id: str = ""


class GenerateJob:
    """Samples a completion of each prompt. A stream that broke is asked for again, for what is missing.

    Without seeds that is so only until the first completion: a request repeated in part would mix two draws.
    """

    method = f"/{GENERATION_SERVICE}/Generate"

    def __init__(
        self, prompts: Sequence[npt.ArrayLike], sampling: Sampling, options: GenerateOptions, pin: Pin
    ) -> None:
        self._request = generation_pb2.GenerateRequest(
            request_id=options.request_id or new_request_id(),
            selector=pin.to_proto(),
            prompts=pack_sequences(prompts),
            sampling=sampling.to_proto(),
            seeds=options.seeds,
            priority=options.priority.value,
        )
        if options.weight_version is not None:
            self._request.selector.weight_version = options.weight_version
        self._pin = pin
        self._weight_version = options.weight_version
        self._max_tokens = sampling.max_tokens
        self._asked = list(range(len(prompts)))
        self._missing = set(self._asked)

    @property
    def tokens(self) -> int:
        """Most tokens that the request will hold."""
        lengths = self._request.prompts.lengths
        return sum(lengths) + self._max_tokens * len(lengths)

    @property
    def resumable(self) -> bool:
        """Whether what is missing may be asked for again."""
        return bool(self._request.seeds) or len(self._missing) == len(self._request.prompts.lengths)

    def encode(self) -> bytes:
        """The request for the prompts that are not completed."""
        lengths = list(self._request.prompts.lengths)
        self._asked = sorted(self._missing)
        if len(self._missing) == len(lengths):
            return self._request.SerializeToString()
        rest = generation_pb2.GenerateRequest()
        rest.CopyFrom(self._request)
        flat = memoryview(self._request.prompts.token_ids)
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + 4 * length)
        rest.prompts.token_ids = b"".join(flat[ends[index] : ends[index + 1]] for index in self._asked)
        del rest.prompts.lengths[:]
        rest.prompts.lengths.extend(lengths[index] for index in self._asked)
        del rest.seeds[:]
        rest.seeds.extend(self._request.seeds[index] for index in self._asked)
        return rest.SerializeToString()

    def accept(self, data: bytes) -> Completion:
        """Check a completion, and strike its prompt off."""
        reply = parse(generation_pb2.GenerateResponse, data)
        if reply.index >= len(self._asked):
            raise InvalidReply("index", str(reply.index), f"an index below {len(self._asked)}")
        index = self._asked[reply.index]
        if index not in self._missing:
            raise InvalidReply("index", f"{reply.index} twice", "one completion for each prompt")
        tokens = unpack_reply_tokens(reply.token_ids, "token_ids")
        if len(tokens) > self._max_tokens:
            raise InvalidReply("token_ids", f"{len(tokens)} tokens", f"at most {self._max_tokens}, as asked for")
        try:
            reason = FinishReason(reply.finish_reason)
        except ValueError:
            raise InvalidReply("finish_reason", str(reply.finish_reason), "STOP or LENGTH") from None
        seeds = self._request.seeds
        if seeds and reply.seed != seeds[index]:
            raise InvalidReply("seed", str(reply.seed), f"{seeds[index]}, as asked for")
        completion = Completion(
            index=index,
            token_ids=tokens,
            logprobs=unpack_reply_floats(reply.logprobs, len(tokens), "logprobs"),
            finish_reason=reason,
            seed=reply.seed,
            state=self._check_state(reply),
            timing=read_timing(reply.timing),
        )
        self._missing.discard(index)
        return completion

    def finish(self) -> None:
        """Raise InvalidReply unless every prompt is completed."""
        if self._missing:
            found = f"no completion of prompt {min(self._missing)}"
            raise InvalidReply("index", found, "one completion for each prompt")

    def _check_state(self, reply: generation_pb2.GenerateResponse) -> ModelState:
        pin = self._pin
        if self._weight_version is None:
            return check_state(reply.model, pin)
        state = check_state(reply.model, Pin(pin.model, None, pin.tokenizer_fingerprint))
        if state.weight_version != self._weight_version:
            raise FailedPrecondition("weight_version", str(state.weight_version), str(self._weight_version))
        return state


def describe(core: ClientCore, timeout_s: float | None) -> Program[ModelDescription]:
    """Ask which model is served and what it takes."""
    job = SingleJob(f"/{GENERATION_SERVICE}/GetGenerationModel", generation_pb2.GetGenerationModelRequest())
    yield from core.ask(job, timeout_s)
    reply = parse(generation_pb2.GetGenerationModelResponse, job.reply)
    state = check_state(reply.model, core.pin)
    return core.learn(ModelDescription(state, read_limits(reply.limits), tuple(reply.eos_token_ids)))
