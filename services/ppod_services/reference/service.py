"""The reference service as the server hosts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from ppod.tensors import TokenArray
from ppod.v1 import reference_pb2_grpc
from ppod_services.core.causal_service import CausalService
from ppod_services.core.scheduler import RunBatch
from ppod_services.core.server import Host
from ppod_services.reference.config import ReferenceServiceConfig
from ppod_services.reference.requests import ReferenceItem, ReferenceResult
from ppod_services.reference.servicer import REFERENCE_SERVICE, ReferenceServicer

if TYPE_CHECKING:
    from ppod_services.core.model import CausalModel
    from ppod_services.core.weights import ServedWeights


class ReferenceService(CausalService[ReferenceItem, ReferenceResult]):
    """Hosts ReferenceService and, on the admin port, WeightService."""

    service_name = REFERENCE_SERVICE
    packs = True

    def __init__(self, config: ReferenceServiceConfig, host: Host) -> None:
        super().__init__(config, host)
        self._adapters = config.adapters
        names = [adapter.name for adapter in config.adapters]
        self._servicer = ReferenceServicer(self.target, self.scheduler, config.limits, names)

    def register(self, server: grpc.aio.Server) -> None:
        """Add ReferenceService."""
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self._servicer, server)

    def build_engine(self, model: CausalModel, weights: ServedWeights) -> RunBatch[ReferenceItem, ReferenceResult]:
        """Make the engine, which needs torch, and put the adapters into the model."""
        from ppod_services.core.adapters import Adapters  # noqa: PLC0415
        from ppod_services.reference.engine import ReferenceEngine  # noqa: PLC0415

        # After `weights` took the parameters' names, because adapters change the names but not the parameters.
        return ReferenceEngine(model, weights, Adapters(model.model, self._adapters)).run

    def warm_up_item(self, position: int, tokens: TokenArray) -> ReferenceItem:
        """A sequence whose prompt is one token."""
        return ReferenceItem(position, tokens, prompt_length=1, temperature=1.0, weight_version=None)
