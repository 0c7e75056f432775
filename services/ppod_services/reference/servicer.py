"""ReferenceService: validates requests and packs logprobs."""

from __future__ import annotations

import math

import grpc.aio

from ppod.errors import InvalidArgument, Unavailable
from ppod.tensors import pack_floats
from ppod.v1 import reference_pb2, reference_pb2_grpc
from ppod_services.core.callers import caller_of
from ppod_services.core.config import LimitsConfig
from ppod_services.core.described import (
    Deferred,
    check_length,
    check_model,
    check_tokenizer,
    effective_deadline_s,
    pinned_version,
    read_sequences,
    request_timing,
)
from ppod_services.core.scheduler import Scheduler, Submission
from ppod_services.core.weight_servicer import WeightTarget
from ppod_services.reference.requests import ReferenceItem, ReferenceResult

REFERENCE_SERVICE = reference_pb2.DESCRIPTOR.services_by_name["ReferenceService"].full_name


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """Computes token logprobs; see reference.proto."""

    def __init__(
        self,
        target: Deferred[WeightTarget],
        scheduler: Scheduler[ReferenceItem, ReferenceResult],
        limits: LimitsConfig,
    ) -> None:
        self._target = target
        self._scheduler = scheduler
        self._limits = limits

    async def ComputeLogprobs(
        self,
        request: reference_pb2.ComputeLogprobsRequest,
        context: grpc.aio.ServicerContext[reference_pb2.ComputeLogprobsRequest, reference_pb2.ComputeLogprobsResponse],
    ) -> reference_pb2.ComputeLogprobsResponse:
        """Answer for all sequences of a request with one version of the weights."""
        target = self._target.get()
        items = self._read(request, target)
        submissions = [Submission(item, len(item.tokens), item.temperature) for item in items]
        ticket = self._scheduler.submit(
            submissions, effective_deadline_s(context.time_remaining(), self._limits), caller_of(request.priority)
        )
        try:
            outcomes = await ticket.gather()
        finally:
            ticket.cancel()
        versions = {outcome.result.weight_version for outcome in outcomes}
        if len(versions) > 1:
            # The request spanned batches on both sides of a commit; a reply must not mix versions.
            raise Unavailable(f"weight versions {sorted(versions)} served during the request; send it again")
        return reference_pb2.ComputeLogprobsResponse(
            model=target.info.state(versions.pop()),
            timing=request_timing(outcomes, sum(len(item.tokens) for item in items)),
            logprobs=pack_floats([outcome.result.logprobs for outcome in outcomes]),
        )

    async def GetReferenceModel(
        self,
        request: reference_pb2.GetReferenceModelRequest,
        context: grpc.aio.ServicerContext[
            reference_pb2.GetReferenceModelRequest, reference_pb2.GetReferenceModelResponse
        ],
    ) -> reference_pb2.GetReferenceModelResponse:
        """Describe the model."""
        target = self._target.get()
        return reference_pb2.GetReferenceModelResponse(
            model=target.info.state(target.weights.version),
            limits=target.info.limits(self._limits.max_request_sequences),
        )

    def _read(self, request: reference_pb2.ComputeLogprobsRequest, target: WeightTarget) -> list[ReferenceItem]:
        info = target.info
        check_model(request.selector, [info.name])
        check_tokenizer(info, request.selector)
        version = pinned_version(request.selector, target.weights.version)
        sequences = read_sequences(request.tokens, "tokens", info, self._limits.max_request_sequences)
        temperature = request.temperature if request.HasField("temperature") else 1.0
        if not math.isfinite(temperature) or temperature <= 0:
            raise InvalidArgument("temperature", str(temperature), "a finite number above 0")
        prompt_lengths = request.prompt_lengths
        if len(prompt_lengths) != len(sequences):
            raise InvalidArgument(
                "prompt_lengths", f"{len(prompt_lengths)} values", f"{len(sequences)}, one for each sequence"
            )
        for sample, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
            check_length(sample, len(tokens), "tokens", info.max_sequence_tokens)
            if not 1 <= prompt_length < len(tokens):
                expected = f"at least 1 and less than the sequence's {len(tokens)} tokens"
                raise InvalidArgument("prompt_lengths", str(prompt_length), expected, sample)
        return [
            ReferenceItem(sample, tokens, prompt_length, temperature, version)
            for sample, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True))
        ]
