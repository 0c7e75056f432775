"""The reference service as the server hosts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from ppod.v1 import reference_pb2_grpc
from ppod_services.core.causal_service import CausalService
from ppod_services.core.config import CausalServiceConfig
from ppod_services.core.scheduler import RunBatch
from ppod_services.core.server import Host
from ppod_services.reference.requests import ReferenceItem, ReferenceResult
from ppod_services.reference.servicer import REFERENCE_SERVICE, ReferenceServicer

if TYPE_CHECKING:
    from ppod_services.core.model import CausalModel
    from ppod_services.core.weights import ServedWeights


class ReferenceService(CausalService[ReferenceItem, ReferenceResult]):
    """Hosts ReferenceService and, on the admin port, WeightService."""

    service_name = REFERENCE_SERVICE

    def __init__(self, config: CausalServiceConfig, host: Host) -> None:
        super().__init__(config, host)
        self._servicer = ReferenceServicer(self.target, self.scheduler, config.limits)

    def register(self, server: grpc.aio.Server) -> None:
        """Add ReferenceService."""
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self._servicer, server)

    def build_engine(self, model: CausalModel, weights: ServedWeights) -> RunBatch[ReferenceItem, ReferenceResult]:
        """Make the engine, which needs torch."""
        from ppod_services.reference.engine import ReferenceEngine  # noqa: PLC0415

        return ReferenceEngine(model, weights).run
