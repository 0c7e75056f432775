"""Replacing a reward model for callers that go away while it is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import cast

import grpc.aio
import pytest

from ppod.v1 import reward_admin_pb2
from ppod_models.configuration import ModelConfig
from ppod_services.core.batch_run import Pause
from ppod_services.core.claims import JobT
from ppod_services.core.config import ListenConfig
from ppod_services.core.described import Deferred
from ppod_services.reward import loading
from ppod_services.reward.admin_servicer import RewardAdminServicer
from ppod_services.reward.config import RewardServiceConfig
from ppod_services.reward.kinds import HeadConfig
from ppod_services.reward.rewards import Parts, RewardSet
from ppod_services.reward.runtime import Runtime
from ppod_services.reward.served import ServedModel

Context = grpc.aio.ServicerContext[reward_admin_pb2.ReplaceModelRequest, reward_admin_pb2.ReplaceModelResponse]


class Gate:
    """Holds up the first who comes by until it is opened; counts who is within."""

    def __init__(self) -> None:
        self.open, self.met = threading.Event(), threading.Event()
        self.came = 0
        self.within = 0
        self.most_within = 0

    def pass_through(self) -> None:
        self.came += 1
        self.within += 1
        self.most_within = max(self.most_within, self.within)
        if self.came == 1:
            self.met.set()
            assert self.open.wait(20)
        self.within -= 1


class Thread:
    """The model's thread, as `Exclusive` has it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def exclusive(self, job: Callable[[], JobT], pause: Pause = Pause.WAIT) -> JobT:
        del pause

        def run() -> JobT:
            self._gate.pass_through()
            return job()

        return await asyncio.to_thread(run)


@pytest.fixture
def config(tiny_model_dir: Path, tiny_heads: dict[str, Path]) -> RewardServiceConfig:
    model = ModelConfig(source=str(tiny_model_dir), device="cpu", dtype="float32")
    heads = tuple(HeadConfig(name=name, model=model, head=str(head)) for name, head in tiny_heads.items())
    return RewardServiceConfig(listen=ListenConfig(port=1024), rewards=heads)


def served(config: RewardServiceConfig) -> Deferred[RewardSet]:
    models = loading.load_all([cast(HeadConfig, one) for one in config.rewards], 128)
    rewards: Deferred[RewardSet] = Deferred()
    by_name = {model.info.name: model for model in models}
    rewards.set(RewardSet(Parts(config.rewards, by_name, {}, (), cast(Runtime, None))))
    return rewards


async def replace_twice(servicer: RewardAdminServicer, gate: Gate) -> None:
    """The first caller goes away while it stands at the gate; the second one wants another model."""

    def replace(name: str) -> Coroutine[None, None, reward_admin_pb2.ReplaceModelResponse]:
        return servicer.ReplaceModel(reward_admin_pb2.ReplaceModelRequest(name=name), cast(Context, None))

    first = asyncio.ensure_future(replace("first"))
    assert await asyncio.to_thread(gate.met.wait, 20)
    first.cancel()
    second = asyncio.ensure_future(replace("second"))
    # As long as it could take to come to the gate, were it let in.
    await asyncio.wait({second}, timeout=0.3)
    gate.open.set()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_two_models_are_never_loaded_at_once(
    config: RewardServiceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards, gate, load_model = served(config), Gate(), loading.load_model

    def load(*arguments: object) -> ServedModel:
        gate.pass_through()
        return load_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_model", load)
    opened = Gate()
    opened.open.set()
    await replace_twice(RewardAdminServicer(rewards, Thread(opened), config, lambda _: None), gate)
    assert (gate.came, gate.most_within) == (2, 1)
    # Whoever went away before the swap changed nothing.
    versions = {name: model.weight_version for name, model in rewards.get().parts.models.items()}
    assert versions == {"first": 0, "second": 1}


async def test_a_replacement_is_kept_whose_caller_left_during_the_swap(config: RewardServiceConfig) -> None:
    rewards, gate = served(config), Gate()
    told: list[int] = []
    await replace_twice(RewardAdminServicer(rewards, Thread(gate), config, told.append), gate)
    versions = {name: model.weight_version for name, model in rewards.get().parts.models.items()}
    assert (versions, told) == ({"first": 1, "second": 1}, [1, 1])
