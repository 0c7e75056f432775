"""ReferenceService: validates requests and packs logprobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import grpc.aio
import numpy as np

from ppod.errors import InvalidArgument, Unavailable
from ppod.tensors import TokenArray, pack_floats, pack_tokens
from ppod.v1 import common_pb2, reference_pb2, reference_pb2_grpc
from ppod_services.core.callers import caller_of
from ppod_services.core.config import LimitsConfig
from ppod_services.core.described import (
    Deferred,
    ModelInfo,
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

_MAX_TOP_K = 64

REFERENCE_SERVICE = reference_pb2.DESCRIPTOR.services_by_name["ReferenceService"].full_name

MIN_TEMPERATURE = float(np.float32(1e-6))
"""Below it logits overflow, and what the caller got wrong would come back as a fault of the model."""


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """Computes token logprobs; see reference.proto.

    Args:
        target: the base model, once it is loaded.
        scheduler: runs the engine.
        limits: what one caller may ask for.
        adapters: names of the models that are the base with an adapter.
    """

    def __init__(
        self,
        target: Deferred[WeightTarget],
        scheduler: Scheduler[ReferenceItem, ReferenceResult],
        limits: LimitsConfig,
        adapters: Sequence[str] = (),
    ) -> None:
        self._target = target
        self._scheduler = scheduler
        self._limits = limits
        self._adapters = adapters

    async def ComputeLogprobs(
        self,
        request: reference_pb2.ComputeLogprobsRequest,
        context: grpc.aio.ServicerContext[reference_pb2.ComputeLogprobsRequest, reference_pb2.ComputeLogprobsResponse],
    ) -> reference_pb2.ComputeLogprobsResponse:
        """Answer for all sequences of a request with one version of the weights."""
        target = self._target.get()
        info, adapter = self._select(target.info, request.selector)
        items = self._read(request, info, adapter, pinned_version(request.selector, target.weights.version))
        submissions = [
            Submission(item, len(item.tokens), (item.adapter, item.temperature), info.packs) for item in items
        ]
        ticket = self._scheduler.submit(
            submissions, effective_deadline_s(context.time_remaining(), self._limits), caller_of(request.priority)
        )
        try:
            outcomes = await ticket.gather()
        finally:
            ticket.cancel()
        results = [outcome.result for outcome in outcomes]
        versions = {result.weight_version for result in results}
        if len(versions) > 1:
            # The request spanned batches on both sides of a commit; a reply must not mix versions.
            raise Unavailable(f"weight versions {sorted(versions)} served during the request; send it again")
        return reference_pb2.ComputeLogprobsResponse(
            model=info.state(versions.pop()),
            timing=request_timing(outcomes, sum(len(item.tokens) for item in items)),
            logprobs=pack_floats([result.logprobs for result in results]),
            entropies=pack_floats([result.entropies for result in results if result.entropies is not None]),
            top_token_ids=b"".join(pack_tokens(result.top_ids.reshape(-1)) for result in results),
            top_logprobs=pack_floats([result.top_logprobs.reshape(-1) for result in results]),
        )

    async def GetReferenceModel(
        self,
        request: reference_pb2.GetReferenceModelRequest,
        context: grpc.aio.ServicerContext[
            reference_pb2.GetReferenceModelRequest, reference_pb2.GetReferenceModelResponse
        ],
    ) -> reference_pb2.GetReferenceModelResponse:
        """Describe a model."""
        target = self._target.get()
        info, _ = self._select(target.info, request.selector)
        pinned_version(request.selector, target.weights.version)
        return reference_pb2.GetReferenceModelResponse(
            model=info.state(target.weights.version), limits=info.limits(self._limits.max_request_sequences)
        )

    def _select(self, base: ModelInfo, selector: common_pb2.ModelSelector) -> tuple[ModelInfo, str | None]:
        """The model that a selector asks for, and its adapter, None for the base."""
        check_tokenizer(base, selector)
        name = check_model(selector, [base.name, *self._adapters])
        return replace(base, name=name), None if name == base.name else name

    def _read(
        self,
        request: reference_pb2.ComputeLogprobsRequest,
        info: ModelInfo,
        adapter: str | None,
        version: int | None,
    ) -> list[ReferenceItem]:
        sequences = read_sequences(request.tokens, "tokens", info, self._limits.max_request_sequences)
        temperature = request.temperature if request.HasField("temperature") else 1.0
        if not math.isfinite(temperature) or temperature < MIN_TEMPERATURE:
            raise InvalidArgument("temperature", str(temperature), f"a finite number, at least {MIN_TEMPERATURE:g}")
        most = min(_MAX_TOP_K, info.vocab_size)
        if request.top_k > most:
            raise InvalidArgument("top_k", str(request.top_k), f"0 to {most}")
        _check_prompts(sequences, request.prompt_lengths, info.max_sequence_tokens)
        return [
            ReferenceItem(sample, tokens, prompt_length, temperature, version, adapter, request.entropy, request.top_k)
            for sample, (tokens, prompt_length) in enumerate(zip(sequences, request.prompt_lengths, strict=True))
        ]


def _check_prompts(sequences: Sequence[TokenArray], prompt_lengths: Sequence[int], longest: int) -> None:
    """Raise InvalidArgument unless each sequence fits the model and has a prompt and a response."""
    if len(prompt_lengths) != len(sequences):
        expected = f"{len(sequences)}, one for each sequence"
        raise InvalidArgument("prompt_lengths", f"{len(prompt_lengths)} values", expected)
    for sample, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        check_length(sample, len(tokens), "tokens.lengths", longest)
        if not 1 <= prompt_length < len(tokens):
            expected = f"at least 1 and less than the sequence's {len(tokens)} tokens"
            raise InvalidArgument("prompt_lengths", str(prompt_length), expected, sample)
