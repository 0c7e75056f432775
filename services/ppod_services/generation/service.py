"""The generation service as the server hosts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from ppod.tensors import TokenArray
from ppod.v1 import generation_pb2_grpc
from ppod_services.core.causal_service import CausalService
from ppod_services.core.config import CausalServiceConfig
from ppod_services.core.scheduler import RunBatch
from ppod_services.core.server import Host
from ppod_services.generation.requests import GeneratedSample, GenerationItem, TokenFilter
from ppod_services.generation.servicer import GENERATION_SERVICE, GenerationServicer

if TYPE_CHECKING:
    from ppod_services.core.model import CausalModel
    from ppod_services.core.weights import ServedWeights


class GenerationService(CausalService[GenerationItem, GeneratedSample]):
    """Hosts GenerationService and, on the admin port, WeightService."""

    service_name = GENERATION_SERVICE

    def __init__(self, config: CausalServiceConfig, host: Host) -> None:
        super().__init__(config, host)
        self._servicer = GenerationServicer(self.target, self.scheduler, config.limits)

    def register(self, server: grpc.aio.Server) -> None:
        """Add GenerationService."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._servicer, server)

    def build_engine(self, model: CausalModel, weights: ServedWeights) -> RunBatch[GenerationItem, GeneratedSample]:
        """Make the engine, which needs torch."""
        from ppod_services.generation.engine import GenerationEngine  # noqa: PLC0415

        return GenerationEngine(model, weights, model.tokenizer).run

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
