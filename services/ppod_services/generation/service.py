"""The generation service as the server hosts it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc.aio

from ppod.tensors import TokenArray
from ppod.v1 import generation_pb2_grpc
from ppod_services.core.broken import ServiceBroken
from ppod_services.core.causal_service import CausalService, LoadedModel
from ppod_services.core.described import Deferred
from ppod_services.core.scheduler import RunBatch
from ppod_services.core.server import Host, StartError
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.output_filtering import Decode, OutputFilters
from ppod_services.generation.requests import (
    GeneratedSample,
    GenerationItem,
    SeedPromise,
    TokenFilter,
    tokens_taken,
)
from ppod_services.generation.servicer import GENERATION_SERVICE, GenerationServicer

if TYPE_CHECKING:
    from ppod_services.core.model import CausalModel
    from ppod_services.core.weights import ServedWeights

_LOOK_S = 0.5
_SEED_PROMISES = {"transformers": SeedPromise.EVERY_REPLICA, "vllm": SeedPromise.UNINTERRUPTED}


class GenerationService(CausalService[GenerationItem, GeneratedSample]):
    """Hosts GenerationService and, on the admin port, WeightService."""

    service_name = GENERATION_SERVICE

    def __init__(self, config: GenerationServiceConfig, host: Host) -> None:
        super().__init__(config, host, tokens_taken)
        self._own_config = config
        self._failure: Callable[[], str | None] = _never
        self._close: Callable[[], None] = _nothing
        self._decode: Deferred[Decode] = Deferred()
        try:
            filters = OutputFilters(config.output_filters, host.metrics.registry)
        except ValueError as error:
            raise StartError(str(error)) from error
        self._servicer = GenerationServicer(
            self.target, self._decode, self.scheduler, config.limits, filters, _SEED_PROMISES[config.backend]
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Add GenerationService."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._servicer, server)

    def load_model(self) -> LoadedModel[GenerationItem, GeneratedSample]:
        """Load the model with the backend that is configured."""
        if self._own_config.backend == "transformers":
            return super().load_model()
        from ppod_services.generation.vllm_backend.loading import load_vllm  # noqa: PLC0415 - it imports torch

        loaded = load_vllm(self._own_config, self._metrics.weight_version)
        self._failure, self._close = loaded.failure, loaded.close
        self._decode.set(lambda tokens: loaded.tokenizer.decode(tokens, skip_special_tokens=True))
        return loaded.model

    async def run(self) -> None:
        """Run batches until cancelled, or until the engine can run none any more."""
        scheduling = asyncio.create_task(super().run())
        try:
            while not scheduling.done():
                await asyncio.wait([scheduling], timeout=_LOOK_S)
                if (failure := self._failure()) is not None:
                    raise ServiceBroken(failure)
            await scheduling
        finally:
            scheduling.cancel()
            await asyncio.to_thread(self._close)

    def build_engine(self, model: CausalModel, weights: ServedWeights) -> RunBatch[GenerationItem, GeneratedSample]:
        """Make the engine, which needs torch."""
        from ppod_services.generation.engine import GenerationEngine  # noqa: PLC0415

        tokenizer = model.tokenizer
        self._decode.set(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
        return GenerationEngine(model, weights, tokenizer, self._own_config.prefill_tokens).run

    def warm_up_item(self, position: int, tokens: TokenArray) -> GenerationItem:
        """Two tokens: one from the prompt, one from the cache."""
        return GenerationItem(
            prompt_index=position,
            sample=0,
            prompt=tokens[:-2] if len(tokens) > 2 else tokens,
            seed=0,
            max_tokens=2,
            token_filter=TokenFilter(temperature=0.0),
            stop_ids=frozenset(),
        )


def _never() -> str | None:
    """An engine in this process ends with it."""


def _nothing() -> None:
    """There is nothing to close."""
