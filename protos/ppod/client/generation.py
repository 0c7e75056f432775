"""Client of GenerationService."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy.typing as npt

from ppod.client.base import (
    ModelDescription,
    ModelState,
    ServiceClient,
    Timing,
    new_request_id,
    read_limits,
    read_timing,
)
from ppod.errors import InvalidReply
from ppod.tensors import FloatArray, TokenArray, pack_sequences, unpack_reply_floats, unpack_reply_tokens
from ppod.v1 import generation_pb2, generation_pb2_grpc


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


class GenerationClient(ServiceClient):
    """Samples completions of prompts."""

    service_name = "ppod.v1.GenerationService"

    def stream(
        self,
        prompts: Sequence[npt.ArrayLike],
        sampling: Sampling,
        *,
        seeds: Sequence[int] = (),
        weight_version: int | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[Completion]:
        """Yield each completion as soon as it is finished, in any order; exactly one for each prompt.

        Args:
            prompts: token ids, each of shape [length], without padding.
            sampling: how tokens are drawn.
            seeds: one for each prompt, or none.
            weight_version: the version that must sample; None takes the pin's.

        Raises:
            PpodError: any class of `ppod.errors`. InvalidReply: a completion is missing, double or malformed.
        """
        request = generation_pb2.GenerateRequest(
            request_id=request_id or new_request_id(),
            selector=self.pin.to_proto(),
            prompts=pack_sequences(prompts),
            sampling=sampling.to_proto(),
            seeds=seeds,
        )
        if weight_version is not None:
            request.selector.weight_version = weight_version
        stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        seen: set[int] = set()
        with self._rpc("Generate"):
            for reply in stub.Generate(request, timeout=timeout_s or self.timeout_s):
                completion = self._read(reply, len(prompts))
                if completion.index in seen:
                    raise InvalidReply("index", f"{completion.index} twice", "one completion for each prompt")
                seen.add(completion.index)
                yield completion
        if len(seen) != len(prompts):
            missing = next(index for index in range(len(prompts)) if index not in seen)
            raise InvalidReply("index", f"no completion of prompt {missing}", "one completion for each prompt")

    def generate(
        self,
        prompts: Sequence[npt.ArrayLike],
        sampling: Sampling,
        *,
        seeds: Sequence[int] = (),
        weight_version: int | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """Wait for all completions and return them in the order of the prompts. Arguments and errors as `stream`."""
        completions = self.stream(
            prompts,
            sampling,
            seeds=seeds,
            weight_version=weight_version,
            request_id=request_id,
            timeout_s=timeout_s,
        )
        return sorted(completions, key=lambda completion: completion.index)

    def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        with self._rpc("GetGenerationModel"):
            reply = stub.GetGenerationModel(
                generation_pb2.GetGenerationModelRequest(), timeout=timeout_s or self.timeout_s
            )
        return ModelDescription(self._check_state(reply.model), read_limits(reply.limits), tuple(reply.eos_token_ids))

    def _read(self, reply: generation_pb2.GenerateResponse, prompts: int) -> Completion:
        if reply.index >= prompts:
            raise InvalidReply("index", str(reply.index), f"an index below {prompts}")
        tokens = unpack_reply_tokens(reply.token_ids, "token_ids")
        try:
            reason = FinishReason(reply.finish_reason)
        except ValueError:
            raise InvalidReply("finish_reason", str(reply.finish_reason), "STOP or LENGTH") from None
        return Completion(
            index=reply.index,
            token_ids=tokens,
            logprobs=unpack_reply_floats(reply.logprobs, len(tokens), "logprobs"),
            finish_reason=reason,
            seed=reply.seed,
            state=self._check_state(reply.model),
            timing=read_timing(reply.timing),
        )
