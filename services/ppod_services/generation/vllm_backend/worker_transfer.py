"""Has the engine's workers receive weights onto their own devices, by vLLM's weight-transfer API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

from ppod.errors import FailedPrecondition, Internal, InvalidArgument, PpodError
from ppod_models.process_groups import GroupError
from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest
from ppod_services.generation.vllm_backend.api import Engine, init_request, update_request
from ppod_services.generation.vllm_backend.host import EngineHost
from ppod_services.generation.vllm_backend.receiver import (
    GROUP_BROKE,
    NO_MEMORY,
    OTHER_CHECKSUM,
    GroupInfo,
    Outcome,
    ReceivedTensor,
    VersionInfo,
)
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.worker_calls import have_workers

_POLL_S = 0.02


class WorkerTransfer:
    """Updates of the workers, from `receive` to `finish`; one at a time.

    Args:
        host: the engine.
        workers: how many it has.
    """

    def __init__(self, host: EngineHost, workers: int) -> None:
        self._host = host
        self.workers = workers
        self.version: int | None = None
        """What all workers have received and not loaded yet."""

    def receive(self, manifest: IncomingManifest, segment: Segment, timeout_s: float) -> None:
        """Have all workers receive a version, while they serve; the first one also into the segment.

        Raises: as `GroupReceiver.receive`.
        """
        group = manifest.collective
        assert group is not None
        if manifest.adapter is not None:
            found = "an adapter, which has to be merged in the service"
            raise FailedPrecondition("manifest.adapter", found, "whole weights, where workers receive")
        self._host.call(self.drop)
        version = VersionInfo(manifest.weight_version, _tensors(manifest, segment), segment.path)
        self._host.call(lambda engine: _begin(engine, _info(group, timeout_s), version))
        outcomes = self._wait()
        if any(outcomes):
            self._host.call(self.drop)
            raise _worst(outcomes, manifest)
        self.version = manifest.weight_version

    async def finish(self, engine: Engine) -> None:
        """Have all workers load what they received. Raises as `have_workers`."""
        self.version = None
        await engine.finish_weight_update()
        await have_workers(engine, "ppod_finished")

    async def drop(self, engine: Engine) -> None:
        """Have them forget it."""
        self.version = None
        await engine.collective_rpc("ppod_drop_received")

    def _wait(self) -> Sequence[Outcome]:
        while True:
            found = self._host.call(lambda engine: engine.collective_rpc("ppod_received"))
            if None not in found:
                return cast("Sequence[Outcome]", found)
            time.sleep(_POLL_S)


async def _begin(engine: Engine, group: GroupInfo, version: VersionInfo) -> None:
    await engine.init_weight_transfer_engine(init_request(asdict(group)))
    await engine.start_weight_update()
    await engine.update_weights(update_request(asdict(version)))


def _info(group: IncomingGroup, timeout_s: float) -> GroupInfo:
    return GroupInfo(
        group.name, group.address, group.backend, group.rank, group.world_size, group.bucket_bytes, timeout_s
    )


def _tensors(manifest: IncomingManifest, segment: Segment) -> list[ReceivedTensor]:
    found: list[ReceivedTensor] = []
    for tensor, offset in zip(manifest.tensors, segment.offsets, strict=True):
        assert tensor.xxh3 is not None
        found.append((tensor.name, tensor.dtype, tensor.shape, tensor.xxh3, offset))
    return found


def _worst(outcomes: Sequence[Outcome], manifest: IncomingManifest) -> PpodError | GroupError:
    """What to tell of workers that did not all receive a version: where one fails, the group breaks for the others."""
    failed = [outcome for outcome in outcomes if outcome]
    kind, *about = next((one for one in failed if one[0] != GROUP_BROKE), failed[0])
    if kind == OTHER_CHECKSUM:
        name, found, expected = about
        return InvalidArgument(f"tensors.{name}.xxh3", found, expected)
    if kind == NO_MEMORY:
        size = sum(tensor.dense_bytes for tensor in manifest.tensors)
        expected = f"{size} bytes free beside vllm.gpu_memory_utilization, or vllm.weights_received_by: service"
        return FailedPrecondition("manifest.collective", f"no memory on a worker's device: {about[0]}", expected)
    return GroupError(about[0]) if kind == GROUP_BROKE else Internal(f"a worker could not receive weights: {about[0]}")
