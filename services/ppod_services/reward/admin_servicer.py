"""RewardAdminService on the admin port: replaces reward models while they serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TypeVar

import grpc.aio

from ppod.errors import FailedPrecondition, InvalidArgument, NotFound
from ppod.v1 import reward_admin_pb2, reward_admin_pb2_grpc
from ppod_models.sources import ModelSourceError
from ppod_services.core.described import Deferred
from ppod_services.core.logs import log_event
from ppod_services.core.weight_servicer import Exclusive
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.kinds import HeadConfig, ModelRewardConfig
from ppod_services.reward.replies import write_state
from ppod_services.reward.rewards import RewardSet
from ppod_services.reward.served import ServedModel

JobT = TypeVar("JobT")

_LOGGER = logging.getLogger(__name__)

REWARD_ADMIN_SERVICE = reward_admin_pb2.DESCRIPTOR.services_by_name["RewardAdminService"].full_name


class RewardAdminServicer(reward_admin_pb2_grpc.RewardAdminServiceServicer):
    """Loads beside what serves, then swaps; see reward_admin.proto."""

    def __init__(
        self,
        rewards: Deferred[RewardSet],
        scheduler: Exclusive,
        config: RewardServiceConfig,
        on_version: Callable[[int], None],
    ) -> None:
        self._rewards = rewards
        self._scheduler = scheduler
        self._config = config
        self._on_version = on_version
        # Two loads at once might not fit into memory.
        self._replacing = asyncio.Lock()

    async def ReplaceModel(
        self,
        request: reward_admin_pb2.ReplaceModelRequest,
        context: grpc.aio.ServicerContext[reward_admin_pb2.ReplaceModelRequest, reward_admin_pb2.ReplaceModelResponse],
    ) -> reward_admin_pb2.ReplaceModelResponse:
        """Replace a model between two batches; when anything fails, the old one goes on serving."""
        async with self._replacing:
            start = time.monotonic()
            rewards = self._rewards.get()
            old = _model(rewards, request.name)
            version = request.weight_version or old.weight_version + 1
            if version <= old.weight_version:
                raise FailedPrecondition("weight_version", str(old.weight_version), f"one below {version}")
            config = _changed(old.config, request.source, request.head)
            try:
                new = (await self._load(config, rewards)).as_version(version)
                load_s = time.monotonic() - start
                await _to_its_end(self._scheduler.exclusive(lambda: self._swap(rewards, new, load_s)))
            except ModelSourceError as error:
                expected = "a model that loads and gives finite scores"
                raise InvalidArgument(_at_fault(request, error), " ".join(str(error).split()), expected) from error
        return reward_admin_pb2.ReplaceModelResponse(model=write_state(new.identity), load_s=load_s)

    async def _load(self, config: ModelRewardConfig, rewards: RewardSet) -> ServedModel:
        from ppod_services.reward.loading import load_model  # noqa: PLC0415 - imports torch, which is there by now

        beside = list(rewards.parts.models.values())
        most = self._config.batching.max_batch_tokens
        return await _to_its_end(asyncio.to_thread(load_model, config, most, beside))

    def _swap(self, rewards: RewardSet, new: ServedModel, load_s: float) -> None:
        """In the models' thread, between two batches; requests that began before keep the model they began with."""
        from ppod_services.reward.loading import warm_up_model  # noqa: PLC0415 - as above

        warm_up_model(new, self._config.warm_up_tokens)
        models = {**rewards.parts.models, new.info.name: new}
        configs = tuple(new.config if one.name == new.info.name else one for one in rewards.parts.configs)
        self._rewards.set(RewardSet(replace(rewards.parts, configs=configs, models=models)))
        # Here, because the caller may have gone by now.
        self._on_version(new.weight_version)
        fields = {"reward": new.info.name, "version": new.weight_version, "source": new.config.model.source}
        log_event(_LOGGER, "reward_replaced", {**fields, "seconds": round(load_s, 3)})


async def _to_its_end(job: Coroutine[None, None, JobT]) -> JobT:
    """Await a job that a thread does. It goes on where the caller goes away: who comes next waits for its end."""
    task = asyncio.ensure_future(job)
    try:
        return await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait({task})


def _at_fault(request: reward_admin_pb2.ReplaceModelRequest, error: ModelSourceError) -> str:
    """The field that names what could not be loaded."""
    from ppod_models.reward_heads import RewardHeadError  # noqa: PLC0415 - imports torch, which is there by now

    return "head" if request.head and isinstance(error.__cause__, RewardHeadError) else "source"


def _model(rewards: RewardSet, name: str) -> ServedModel:
    model = rewards.parts.models.get(name)
    if model is None:
        raise NotFound("model", name, f"models of this server are {', '.join(rewards.parts.models) or 'none'}")
    return model


def _changed(config: ModelRewardConfig, source: str, head: str) -> ModelRewardConfig:
    """The configuration with another source and head, where those are given."""
    model = config.model.model_copy(update={"source": source}) if source else config.model
    changed = config.model_copy(update={"model": model})
    if not head:
        return changed
    if not isinstance(changed, HeadConfig):
        raise InvalidArgument("head", repr(head), f"none: {config.name!r} is a {config.kind}, which has no head")
    return changed.model_copy(update={"head": head})
