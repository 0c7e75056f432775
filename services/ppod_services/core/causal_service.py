"""What a service with one causal language model is, as the server hosts it: generation and reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import grpc.aio

from ppod.errors import InvalidArgument
from ppod.tensors import TokenArray
from ppod_models.sources import resolve
from ppod_services.core.config import CausalServiceConfig
from ppod_services.core.described import Deferred, ModelInfo
from ppod_services.core.scheduler import JoinableSink, RunBatch, Scheduler
from ppod_services.core.server import Host, StartError
from ppod_services.core.warm_up import warm_up
from ppod_services.core.weight_servicer import WEIGHT_SERVICE, WeightServicer, WeightTarget

if TYPE_CHECKING:
    from ppod_services.core.model import CausalModel
    from ppod_services.core.weights import ServedWeights

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[ItemT, ResultT]):
    """A model that can serve: what it is, what runs batches on it, and where its new weights go."""

    info: ModelInfo
    run_batch: RunBatch[ItemT, ResultT]
    weights: ServedWeights


class CausalService(ABC, Generic[ItemT, ResultT]):
    """Wires scheduler, engine and weights; imports torch only in `load`, once the ports are bound."""

    admin_service_name = WEIGHT_SERVICE
    packs = False
    """Whether the engine takes packed sequences from models that can."""

    def __init__(
        self, config: CausalServiceConfig, host: Host, taken: Callable[[ItemT, ResultT], int] | None = None
    ) -> None:
        self._config = config
        self._metrics = host.metrics
        self._engine: Deferred[RunBatch[ItemT, ResultT]] = Deferred()
        self.target: Deferred[WeightTarget] = Deferred()
        self._weight_servicer: WeightServicer | None = None
        self.scheduler = Scheduler(self._run_batch, config.batching, host.executor, host.metrics, taken=taken)

    @abstractmethod
    def build_engine(self, model: CausalModel, weights: ServedWeights) -> RunBatch[ItemT, ResultT]:
        """Make what runs batches; called in the model's thread."""

    @abstractmethod
    def warm_up_item(self, position: int, tokens: TokenArray) -> ItemT:
        """Make an item of a batch that runs before the service is ready."""

    def register_admin(self, server: grpc.aio.Server) -> None:
        """Add WeightService."""
        try:
            self._weight_servicer = WeightServicer(self.target, self.scheduler, self._config.weights)
        except InvalidArgument as error:
            raise StartError(f"weights: {error}") from error
        self._weight_servicer.add_to_server(server)

    def load(self) -> None:
        """Load the model in the calling thread, and run it once."""
        # Before the imports, which take seconds: a missing model is told at once.
        resolve(self._config.model.source)
        loaded = self.load_model()
        warm_up(loaded.run_batch, loaded.info, self._config.warm_up_tokens, self.warm_up_item)
        self._engine.set(loaded.run_batch)
        self.target.set(WeightTarget(loaded.info, loaded.weights))

    def load_model(self) -> LoadedModel[ItemT, ResultT]:
        """Load the model with transformers; called in the model's thread."""
        from ppod_services.core.model import load_causal_model  # noqa: PLC0415 - see the class
        from ppod_services.core.model_weights import ModelWeights  # noqa: PLC0415
        from ppod_services.core.weights import ServedWeights  # noqa: PLC0415

        config = self._config
        model = load_causal_model(config.model, config.name, config.batching.max_batch_tokens, pack=self.packs)
        weights = ServedWeights(ModelWeights(model.model), self._metrics.weight_version)
        return LoadedModel(model.info, self.build_engine(model, weights), weights)

    async def run(self) -> None:
        """Run batches until cancelled."""
        try:
            await self.scheduler.run()
        finally:
            if self._weight_servicer is not None:
                self._weight_servicer.close()

    def _run_batch(self, items: Sequence[ItemT], sink: JoinableSink[ItemT, ResultT]) -> None:
        self._engine.get()(items, sink)
