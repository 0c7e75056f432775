"""The reward service as the server hosts it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc.aio

from ppod.tensors import FloatArray
from ppod.v1 import reward_admin_pb2_grpc, reward_pb2_grpc
from ppod_models.sources import resolve, resolve_tokenizer
from ppod_services.core.admission import OnRefused
from ppod_services.core.described import Deferred
from ppod_services.core.scheduler import Scheduler
from ppod_services.core.server import Host
from ppod_services.reward.admin_servicer import REWARD_ADMIN_SERVICE, RewardAdminServicer
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.functions.pool import FunctionPool
from ppod_services.reward.functions.registry import FUNCTIONS
from ppod_services.reward.judge import Judge
from ppod_services.reward.kinds import FunctionConfig, JudgeConfig, PpodServerConfig
from ppod_services.reward.requests import RewardItem, run_batch
from ppod_services.reward.rewards import Parts, RewardSet, model_configs
from ppod_services.reward.runtime import Runtime
from ppod_services.reward.samples import TokenSource
from ppod_services.reward.served import ServedModel
from ppod_services.reward.servicer import REWARD_SERVICE, RewardServicer
from ppod_services.reward.text_rewards import FunctionScorer, TextScorer


class RewardService:
    """Wires servicers, scheduler and rewards; imports torch only in `load`, once the ports are bound.

    Attributes:
        rewards: all rewards, once they are loaded.
    """

    service_name = REWARD_SERVICE
    admin_service_name = REWARD_ADMIN_SERVICE

    def __init__(self, config: RewardServiceConfig, host: Host) -> None:
        self.rewards: Deferred[RewardSet] = Deferred()
        self._config = config
        self._host = host
        self._scheduler: Scheduler[RewardItem, FloatArray] = Scheduler(
            run_batch, config.batching, host.executor, host.metrics
        )
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        refused = host.metrics.refused
        self._pools = {
            one.name: FunctionPool(one, refused) for one in config.rewards if isinstance(one, FunctionConfig)
        }
        self._judges: dict[str, Judge] = {}

    def register(self, server: grpc.aio.Server) -> None:
        """Add RewardService."""
        reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(self.rewards, self._config), server)

    def register_admin(self, server: grpc.aio.Server) -> None:
        """Add RewardAdminService."""
        servicer = RewardAdminServicer(self.rewards, self._scheduler, self._config, self._host.metrics.weight_version)
        reward_admin_pb2_grpc.add_RewardAdminServiceServicer_to_server(servicer, server)

    def load(self) -> None:
        """Load the models in the calling thread."""
        configs = model_configs(self._config.rewards)
        # Before the imports, which take seconds: a missing model is told at once.
        for config in configs:
            resolve(config.model.source)
        for source in self._config.tokenizers:
            resolve_tokenizer(source)
        models: list[ServedModel] = []
        tokenizers: list[TokenSource] = []
        if configs or self._config.tokenizers:
            from ppod_services.reward.loading import load_all, load_tokenizer_source  # noqa: PLC0415

            models = load_all(configs, self._config.batching.max_batch_tokens, self._config.warm_up_tokens)
            tokenizers = [load_tokenizer_source(source) for source in self._config.tokenizers]
        self.rewards.set(
            RewardSet(
                Parts(
                    configs=self._config.rewards,
                    models={model.info.name: model for model in models},
                    text_scorers=self._text_scorers(),
                    tokenizers=tuple(tokenizers),
                    runtime=Runtime(self._scheduler, self._tokenizing),
                )
            )
        )

    async def run(self) -> None:
        """Run batches, functions and judges until cancelled."""
        starting = [asyncio.ensure_future(pool.start()) for pool in self._pools.values()]
        try:
            await self._scheduler.run()
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            for closing in (*self._pools.values(), *self._judges.values()):
                await closing.close()
            self._tokenizing.shutdown(wait=False)

    def _text_scorers(self) -> Mapping[str, TextScorer]:
        scorers: dict[str, TextScorer] = {}
        for config in self._config.rewards:
            if isinstance(config, FunctionConfig):
                needed = FUNCTIONS.find(config.function).needs_references
                scorers[config.name] = FunctionScorer(self._pools[config.name], needed)
            elif isinstance(config, JudgeConfig):
                self._judges[config.name] = scorers[config.name] = _make_judge(config, self._host.metrics.refused)
        return scorers


def _make_judge(config: JudgeConfig, on_refused: OnRefused) -> Judge:
    from ppod_services.reward.judge_servers import make_server  # noqa: PLC0415 - seconds of import; see the class

    codec = None
    if isinstance(config.server, PpodServerConfig):
        from ppod_services.reward.loading import load_tokenizer_source  # noqa: PLC0415

        codec = load_tokenizer_source(config.server.tokenizer).codec
    return Judge(config, make_server(config, codec), on_refused)
