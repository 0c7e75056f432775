"""GenerationService: validates requests and streams completions."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator

import grpc.aio

from ppod.errors import InvalidArgument
from ppod.tensors import pack_floats, pack_tokens
from ppod.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from ppod_services.core.callers import caller_of
from ppod_services.core.config import LimitsConfig
from ppod_services.core.described import (
    Deferred,
    ModelInfo,
    check_model,
    check_tokenizer,
    effective_deadline_s,
    pinned_version,
    read_sequences,
)
from ppod_services.core.scheduler import Outcome, Scheduler, Submission
from ppod_services.core.weight_servicer import WeightTarget
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, TokenFilter

GENERATION_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
_REASONS = {
    Ending.STOP: generation_pb2.FINISH_REASON_STOP,
    Ending.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    Ending.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
    Ending.ABORTED: generation_pb2.FINISH_REASON_ABORTED,
}


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Samples completions; see generation.proto."""

    def __init__(
        self,
        target: Deferred[WeightTarget],
        scheduler: Scheduler[GenerationItem, GeneratedSample],
        limits: LimitsConfig,
    ) -> None:
        self._target = target
        self._scheduler = scheduler
        self._limits = limits

    async def Generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse],
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Stream each completion as soon as it is finished."""
        target = self._target.get()
        items = self._read(request, target)
        submissions = [Submission(item, len(item.prompt) + item.max_tokens) for item in items]
        ticket = self._scheduler.submit(
            submissions, effective_deadline_s(context.time_remaining(), self._limits), caller_of(request.priority)
        )
        try:
            async for outcome in ticket.stream():
                yield _reply(items[outcome.index], outcome, target.info)
        finally:
            ticket.cancel()

    async def GetGenerationModel(
        self,
        request: generation_pb2.GetGenerationModelRequest,
        context: grpc.aio.ServicerContext[
            generation_pb2.GetGenerationModelRequest, generation_pb2.GetGenerationModelResponse
        ],
    ) -> generation_pb2.GetGenerationModelResponse:
        """Describe the model."""
        target = self._target.get()
        return generation_pb2.GetGenerationModelResponse(
            model=target.info.state(target.weights.version),
            limits=target.info.limits(self._limits.max_request_sequences),
            eos_token_ids=target.info.eos_token_ids,
        )

    def _read(self, request: generation_pb2.GenerateRequest, target: WeightTarget) -> list[GenerationItem]:
        info = target.info
        check_model(request.selector, [info.name])
        check_tokenizer(info, request.selector)
        version = pinned_version(request.selector, target.weights.version)
        prompts = read_sequences(request.prompts, "prompts", info, self._limits.max_request_sequences)
        for sample, prompt in enumerate(prompts):
            if len(prompt) >= info.max_sequence_tokens:
                expected = f"at most {info.max_sequence_tokens - 1} tokens, to leave room for one"
                raise InvalidArgument("prompts.lengths", f"{len(prompt)} tokens", expected, sample)
        sampling = request.sampling
        token_filter = _read_filter(request)
        stop_ids = _read_stop_ids(sampling, info)
        return [
            GenerationItem(
                prompt_index=index,
                sample=0,
                prompt=prompt,
                seed=seed,
                max_tokens=min(sampling.max_tokens, info.max_sequence_tokens - len(prompt)),
                token_filter=token_filter,
                stop_ids=stop_ids,
                weight_version=version,
            )
            for index, (prompt, seed) in enumerate(zip(prompts, _read_seeds(request), strict=True))
        ]


def _read_filter(request: generation_pb2.GenerateRequest) -> TokenFilter:
    if not request.HasField("sampling"):
        raise InvalidArgument("sampling", "nothing", "sampling parameters")
    sampling = request.sampling
    if sampling.max_tokens == 0:
        raise InvalidArgument("sampling.max_tokens", "0", "at least 1")
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if not math.isfinite(temperature) or temperature < 0:
        raise InvalidArgument("sampling.temperature", str(temperature), "a finite number, 0 for greedy or more")
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidArgument("sampling.top_p", str(top_p), "more than 0 and at most 1")
    return TokenFilter(temperature=temperature, top_p=top_p, top_k=sampling.top_k)


def _read_stop_ids(sampling: generation_pb2.SamplingParams, info: ModelInfo) -> frozenset[int]:
    for token in sampling.stop_token_ids:
        if token >= info.vocab_size:
            raise InvalidArgument("sampling.stop_token_ids", str(token), f"ids from 0 to {info.vocab_size - 1}")
    own = () if sampling.ignore_eos else info.eos_token_ids
    return frozenset([*sampling.stop_token_ids, *own])


def _read_seeds(request: generation_pb2.GenerateRequest) -> list[int]:
    count = len(request.prompts.lengths)
    if not request.seeds:
        return [secrets.randbits(64) for _ in range(count)]
    if len(request.seeds) != count:
        raise InvalidArgument("seeds", f"{len(request.seeds)} seeds", f"{count}, one for each prompt, or none")
    return list(request.seeds)


def _reply(item: GenerationItem, outcome: Outcome[GeneratedSample], info: ModelInfo) -> generation_pb2.GenerateResponse:
    sample = outcome.result
    return generation_pb2.GenerateResponse(
        index=outcome.index,
        token_ids=pack_tokens(sample.tokens),
        logprobs=pack_floats(sample.logprobs),
        finish_reason=_REASONS[sample.ending],
        model=info.state(sample.weight_version),
        timing=common_pb2.Timing(
            queue_s=outcome.queue_s, compute_s=outcome.compute_s, tokens=len(item.prompt) + len(sample.tokens)
        ),
        seed=item.seed,
    )
