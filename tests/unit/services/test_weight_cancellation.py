"""A caller that goes away while its weights are prepared, without a server."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch
from torch import nn

from ppod import ResourceExhausted
from ppod.client import CollectiveGroup, RelayHop, WeightPush, WeightTensor, weight_calls
from ppod.weight_changes import TensorEncoding
from ppod_services.core.batch_run import Pause
from ppod_services.core.config import WeightsConfig
from ppod_services.core.described import Deferred, ModelInfo
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.relay_files import RelayFiles
from ppod_services.core.weight_manifest import IncomingManifest
from ppod_services.core.weight_servicer import WeightServicer, WeightTarget
from ppod_services.core.weight_store import FileMemory
from ppod_services.core.weights import ServedWeights
from support.weight_tensors import weight_tensors

JobT = TypeVar("JobT")


class Gate:
    """Where a thread is held until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(10)


class GatedImages(ModelWeights):
    """The base of changes is found slowly."""

    gate = Gate()

    def image(self, name: str, dtype: str) -> torch.Tensor | None:
        self.gate.pass_through()
        return super().image(name, dtype)


class AtOnce:
    async def exclusive(self, job: Callable[[], JobT], pause: Pause = Pause.WAIT) -> JobT:
        del pause
        return job()


def servicer(store: ModelWeights, config: WeightsConfig) -> WeightServicer:
    target: Deferred[WeightTarget] = Deferred()
    info = ModelInfo("policy", "", 1, 1, "float32", "cpu")
    target.set(WeightTarget(info, ServedWeights(store, lambda _: None)))
    return WeightServicer(target, AtOnce(), config)


async def prepare(service: WeightServicer, push: WeightPush) -> None:
    async def sent() -> AsyncGenerator[bytes]:
        for message in weight_calls.messages(push, "here"):
            yield message

    context = cast(Any, SimpleNamespace(time_remaining=lambda: 10.0))
    await service.PrepareWeights(sent(), context)


async def prepared(service: WeightServicer, push: WeightPush) -> bool:
    """Whether no other transfer was under way."""
    try:
        await prepare(service, push)
    except ResourceExhausted:
        return False
    return True


async def gone_at(gate: Gate, service: WeightServicer, push: WeightPush) -> asyncio.Task[None]:
    """A call whose caller goes away while a thread works for it."""
    call = asyncio.create_task(prepare(service, push))
    assert await asyncio.to_thread(gate.reached.wait, 10)
    call.cancel()
    await asyncio.wait({call}, timeout=0.1)
    return call


def locked(path: Path) -> bool:
    opened = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(opened)
    return False


async def test_a_file_that_was_made_for_nobody_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, make = Gate(), RelayFiles.memory
    made: list[FileMemory] = []

    def slow(self: RelayFiles, manifest: IncomingManifest) -> FileMemory:
        made.append(make(self, manifest))
        gate.pass_through()
        return made[0]

    monkeypatch.setattr(RelayFiles, "memory", slow)
    service = servicer(ModelWeights(nn.Linear(2, 2)), WeightsConfig(relay_directory=tmp_path))
    hops = (RelayHop("127.0.0.1:9", shares_directory=True),)
    call = await gone_at(gate, service, WeightPush(1, weight_tensors(nn.Linear(2, 2)), relay=hops))
    assert call.cancelled()
    (path,) = tmp_path.rglob("*.safetensors")
    assert locked(path)
    gate.opened.set()
    async with asyncio.timeout(10):
        while locked(path):
            await asyncio.sleep(0.01)
    service.close()


async def test_memory_that_is_still_written_to_is_given_to_no_other_transfer() -> None:
    model = nn.Linear(2, 2)
    service = servicer(GatedImages(model), WeightsConfig())
    unchanged, whole = weight_calls.with_checksums(weight_tensors(model))
    none = WeightTensor(
        unchanged.name, unchanged.dtype, unchanged.shape, memoryview(b""), TensorEncoding.BITMAP, unchanged.xxh3
    )
    call = await gone_at(GatedImages.gate, service, WeightPush(1, [none, whole], base_version=0))
    assert not call.done()
    other = weight_tensors(nn.Linear(2, 2))
    with pytest.raises(ResourceExhausted, match="another transfer"):
        await prepare(service, WeightPush(1, other))
    GatedImages.gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    await prepare(service, WeightPush(1, other))


async def test_a_sender_that_left_before_its_store_was_met_keeps_no_other_waiting() -> None:
    model = nn.Linear(2, 2)
    service = servicer(ModelWeights(model), WeightsConfig(collective_addresses=("127.0.0.1:*",), idle_timeout_s=60))
    tensors = weight_calls.with_checksums(weight_tensors(model))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        group = CollectiveGroup("g", address, "gloo", {"here": range(1, 2)}, 2**20)
        call = asyncio.create_task(prepare(service, WeightPush(1, tensors, collective=group)))
        met, _ = await asyncio.to_thread(silent.accept)
        with met:
            call.cancel()
            async with asyncio.timeout(10):
                while not await prepared(service, WeightPush(1, tensors)):
                    await asyncio.sleep(0.01)
