"""GenerationService: validates requests and streams completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from ppod.tensors import pack_floats, pack_tokens
from ppod.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from ppod_services.core.callers import caller_of
from ppod_services.core.config import LimitsConfig
from ppod_services.core.described import Deferred, ModelInfo, effective_deadline_s
from ppod_services.core.scheduler import Outcome, Scheduler, Submission
from ppod_services.core.weight_servicer import WeightTarget
from ppod_services.generation.output_filtering import Decode, OutputFilters
from ppod_services.generation.reading import read_items
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, SeedPromise, tokens_taken

GENERATION_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
_REASONS = {
    Ending.STOP: generation_pb2.FINISH_REASON_STOP,
    Ending.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    Ending.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
    Ending.ABORTED: generation_pb2.FINISH_REASON_ABORTED,
}
_PROMISES = {
    SeedPromise.EVERY_REPLICA: generation_pb2.SEED_PROMISE_EVERY_REPLICA,
    SeedPromise.UNINTERRUPTED: generation_pb2.SEED_PROMISE_UNINTERRUPTED,
}


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Samples completions; see generation.proto.

    Args:
        target: the model.
        decode: turns its tokens into text.
        scheduler: runs completions.
        limits: what a request may hold.
        filters: what may withhold completions.
        seed_promise: what the engine promises of seeds.
    """

    def __init__(
        self,
        target: Deferred[WeightTarget],
        decode: Deferred[Decode],
        scheduler: Scheduler[GenerationItem, GeneratedSample],
        limits: LimitsConfig,
        filters: OutputFilters,
        seed_promise: SeedPromise,
    ) -> None:
        self._target = target
        self._decode = decode
        self._scheduler = scheduler
        self._limits = limits
        self._filters = filters
        self._seed_promise = seed_promise

    async def Generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse],
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Stream each completion as soon as it is finished."""
        target, decode = self._target.get(), self._decode.get()
        items = read_items(request, target.info, target.weights.version, self._limits.max_request_sequences)
        submissions = [Submission(item, len(item.prompt) + item.max_tokens) for item in items]
        ticket = self._scheduler.submit(
            submissions, effective_deadline_s(context.time_remaining(), self._limits), caller_of(request.priority)
        )
        try:
            async for outcome in ticket.stream():
                item = items[outcome.index]
                reason = await self._filters.reason(item, outcome.result, decode)
                if reason is None:
                    yield _reply(item, outcome, target.info)
                else:
                    yield _withheld(item, outcome, target.info, reason)
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
            seed_promise=_PROMISES[self._seed_promise],
        )


def _reply(item: GenerationItem, outcome: Outcome[GeneratedSample], info: ModelInfo) -> generation_pb2.GenerateResponse:
    sample = outcome.result
    reply = _envelope(item, outcome, info)
    reply.token_ids = pack_tokens(sample.tokens)
    reply.logprobs = pack_floats(sample.logprobs)
    reply.finish_reason = _REASONS[sample.ending]
    if sample.unscaled_logprobs is not None:
        reply.unscaled_logprobs = pack_floats(sample.unscaled_logprobs)
    if len(sample.spans) > 1:
        reply.weight_spans.extend(
            generation_pb2.WeightSpan(weight_version=span.weight_version, tokens=span.tokens) for span in sample.spans
        )
    return reply


def _withheld(
    item: GenerationItem, outcome: Outcome[GeneratedSample], info: ModelInfo, reason: str
) -> generation_pb2.GenerateResponse:
    """A reply without the tokens."""
    reply = _envelope(item, outcome, info)
    reply.finish_reason = generation_pb2.FINISH_REASON_FILTERED
    reply.filter_reason = reason
    return reply


def _envelope(
    item: GenerationItem, outcome: Outcome[GeneratedSample], info: ModelInfo
) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        index=item.prompt_index,
        sample=item.sample,
        model=info.state(outcome.result.weight_version),
        timing=common_pb2.Timing(
            queue_s=outcome.queue_s,
            compute_s=outcome.compute_s,
            tokens=tokens_taken(item, outcome.result),
        ),
        seed=item.seed,
    )
