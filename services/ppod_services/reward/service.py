"""The reward service as the server hosts it."""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from ppod.v1 import reward_pb2_grpc
from ppod_models.sources import resolve
from ppod_services.core.described import Deferred
from ppod_services.core.scheduler import RunBatch, Scheduler, Sink
from ppod_services.core.server import Host
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.requests import RewardItem, RewardTarget
from ppod_services.reward.servicer import REWARD_SERVICE, RewardServicer


class RewardService:
    """Wires servicer, scheduler and engine; imports torch only in `load`, once the ports are bound."""

    service_name = REWARD_SERVICE
    admin_service_name = None

    def __init__(self, config: RewardServiceConfig, host: Host) -> None:
        self._config = config
        self._targets: Deferred[list[RewardTarget]] = Deferred()
        self._engine: Deferred[RunBatch[RewardItem, float]] = Deferred()
        self._scheduler = Scheduler(self._run_batch, config.batching, host.executor, host.metrics)

    def register(self, server: grpc.aio.Server) -> None:
        """Add RewardService."""
        servicer = RewardServicer(self._targets, self._scheduler, self._config.limits)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)

    def register_admin(self, server: grpc.aio.Server) -> None:
        """Nothing: reward models do not change while a server runs."""

    def load(self) -> None:
        """Load the models in the calling thread."""
        # Before the imports, which take seconds: a missing model is told at once.
        for model in self._config.models:
            resolve(model.model.source)
        from ppod_services.reward.engine import load_reward_models  # noqa: PLC0415 - see the class

        engine, targets = load_reward_models(self._config.models, self._config.batching.max_batch_tokens)
        self._engine.set(engine.run)
        self._targets.set(targets)

    async def run(self) -> None:
        """Run batches until cancelled."""
        await self._scheduler.run()

    def _run_batch(self, items: Sequence[RewardItem], sink: Sink[float]) -> None:
        self._engine.get()(items, sink)
