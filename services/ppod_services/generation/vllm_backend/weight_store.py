"""The weights of a vLLM engine: received into memory that its workers map, loaded by them between two steps."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from ppod.errors import FailedPrecondition, Internal
from ppod_models.loading import DTYPES
from ppod_services.core.logs import log_event
from ppod_services.core.lora import adapter_shapes, merge_layer
from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor, LoraAdapter
from ppod_services.core.weight_store import GroupReceiver, Install, ReceivedWeights
from ppod_services.generation.vllm_backend.api import Engine
from ppod_services.generation.vllm_backend.checkpoint import Checkpoint
from ppod_services.generation.vllm_backend.host import EngineHost
from ppod_services.generation.vllm_backend.segments import Segment
from ppod_services.generation.vllm_backend.worker_calls import have_workers
from ppod_services.generation.vllm_backend.worker_transfer import WorkerTransfer

_LOGGER = logging.getLogger(__name__)
_POLL_S = 0.005
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Image:
    """One version as it arrived."""

    weight_version: int
    segment: Segment
    tensors: Mapping[str, torch.Tensor]

    @property
    def layout(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """What a worker needs to find the tensors in the segment."""
        return [
            (name, _NAMES[tensor.dtype], tuple(tensor.shape), offset)
            for (name, tensor), offset in zip(self.tensors.items(), self.segment.offsets, strict=True)
        ]

    async def load(self, engine: Engine) -> None:
        """Have all workers load it from the segment, and label the tokens that come.

        Raises: as `have_workers`.
        """
        await have_workers(engine, "ppod_load_weights", self.segment.path, self.layout, self.weight_version)
        await self.label(engine)

    async def stage(self, engine: Engine) -> None:
        """Have all workers bring it to their devices, and wait until that has ended."""
        await engine.collective_rpc("ppod_stage_weights", args=(self.segment.path, self.layout, self.weight_version))
        await _staged(engine)

    async def stage_received(self, engine: Engine) -> None:
        """As `stage`, where they have received it themselves."""
        await engine.collective_rpc("ppod_stage_received", args=(self.layout, self.weight_version))
        await _staged(engine)
        await engine.collective_rpc("ppod_keep_staged", args=(self.weight_version,))

    async def label(self, engine: Engine) -> None:
        """Label the tokens that come, now that it is loaded."""
        if not await engine.reset_prefix_cache():
            raise Internal("vLLM kept cached prefixes of the old weights")
        await engine.update_weight_version(str(self.weight_version))


class VllmWeights:
    """A `WeightStore` for the engine's processes.

    The version that serves is kept as it arrived, to load it again where loading its successor fails. An adapter is
    merged into a copy of the base, which is kept beside it.

    Args:
        host: the engine.
        shapes: names and shapes of all weights, as a checkpoint has them.
        linear: names of the linear layers that have weights of their own.
        checkpoint: what the engine started with.
        workers: receive a group's broadcasts; None: the service does.
        stages: have the workers copy a version to their devices before its commit.
    """

    def __init__(
        self,
        host: EngineHost,
        shapes: Mapping[str, tuple[int, ...]],
        linear: Set[str],
        checkpoint: Checkpoint,
        workers: WorkerTransfer | None = None,
        *,
        stages: bool = False,
    ) -> None:
        self._host = host
        self._shapes = shapes
        self._linear = linear
        self._checkpoint = checkpoint
        self._workers = workers
        self._stages = stages
        self._base: _Image | None = None
        self._serving: _Image | None = None
        self._receiving: Segment | None = None
        self._spare: Segment | None = None

    @property
    def group_receiver(self) -> GroupReceiver | None:
        """See `WeightStore`."""
        return None if self._workers is None else self

    @property
    def borrows(self) -> bool:
        """See `WeightStore`: the workers read from segments of ours alone."""
        return False

    @property
    def ranks(self) -> int:
        """See `GroupReceiver`: one for each worker."""
        return 1 if self._workers is None else self._workers.workers

    def receive(self, manifest: IncomingManifest, timeout_s: float) -> None:
        """See `GroupReceiver`."""
        assert self._workers is not None
        assert self._receiving is not None
        self._workers.receive(manifest, self._receiving, timeout_s)

    def shapes(self, adapter: LoraAdapter | None) -> Mapping[str, tuple[int, ...]]:
        """See `WeightStore`.

        Raises:
            FailedPrecondition: the engine's own weights are quantised, for which its loaders take no others.
        """
        if (method := self._checkpoint.quantisation) is not None:
            found, expected = (
                f"a model quantised by {method}",
                "one that is not, such as the checkpoint it was made from",
            )
            raise FailedPrecondition("model", found, expected)
        return self._shapes if adapter is None else adapter_shapes(adapter, self._shapes, self._linear)

    def allocate(self, tensors: Sequence[IncomingTensor]) -> Sequence[torch.Tensor]:
        """See `WeightStore`: shared memory, that of the version before the serving one where it fits.

        Pages that were never written cost a fault each, which makes receiving slower than it needs to be.
        """
        self._forget_received()
        shapes, dtypes = [tensor.shape for tensor in tensors], [DTYPES[tensor.dtype] for tensor in tensors]
        spare, self._spare = self._spare, None
        self._receiving = spare if spare is not None and spare.holds(shapes, dtypes) else Segment(shapes, dtypes)
        return self._receiving.tensors

    def image(self, name: str, dtype: str) -> torch.Tensor | None:
        """See `WeightStore`."""
        tensor = self._base_tensor(name)
        wire = DTYPES[dtype]
        return tensor.to(wire) if tensor is not None and tensor.dtype in (wire, torch.float32) else None

    def stage(self, received: ReceivedWeights) -> Install:
        """See `WeightStore`: what lies elsewhere than in shared memory is copied there."""
        if received.borrowed:
            # Its transfer needed no memory of ours.
            self._forget_received()
        receiving, self._receiving = self._receiving, None
        if received.adapter is None:
            image = self._staged(_shared(received.weight_version, received.tensors, receiving))
            return lambda: self._install(image, image)
        merged = self._merged(received.adapter, received.tensors)
        image = self._staged(_shared(received.weight_version, merged, None))
        return lambda: self._install(image, self._base)

    def _staged(self, image: _Image) -> _Image:
        """The version, on its way to the workers' devices where it is to wait there and has not come there already."""
        there = self._workers is not None and self._workers.version == image.weight_version
        if self._stages:
            self._host.call(image.stage_received if there else image.stage)
        return image

    def _forget_received(self) -> None:
        """Where another transfer brings the version that the workers received, its bytes may be others."""
        if self._workers is not None:
            self._workers.version = None

    def _merged(self, adapter: LoraAdapter, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """All weights, with an adapter's change of the base's."""
        merged: dict[str, torch.Tensor] = {}
        changed = {f"{layer}.weight": layer for layer in adapter.target_modules}
        for name in self._shapes:
            base = self._base_tensor(name)
            if base is None:
                found, expected = f"no {name} in the model's files", "whole weights, pushed before an adapter"
                raise FailedPrecondition("base_version", found, expected)
            layer = changed.get(name)
            merged[name] = base if layer is None else merge_layer(base, adapter, tensors, layer)
        return merged

    def _base_tensor(self, name: str) -> torch.Tensor | None:
        """The base's tensor as it came, or as the model's files have it."""
        return self._checkpoint.read(name) if self._base is None else self._base.tensors[name]

    def _install(self, image: _Image, base: _Image | None) -> None:
        """Have the workers load new weights; where that fails, those that served.

        Raises:
            Internal: the new weights could not be loaded, and the old ones serve on. Unavailable: nothing serves.
        """
        error = self._host.wait(functools.partial(self._replace, image)).exception()
        if error is not None:
            self._restore(error)
            self._resume()
            version = image.weight_version
            raise Internal(f"vLLM could not load version {version}; the old one serves on: {error}") from error
        old = self._base or self._serving
        self._serving, self._base = image, base
        self._spare = old.segment if old is not None and old is not base else None
        self._resume()

    async def _replace(self, image: _Image, engine: Engine) -> None:
        """Have the workers load it from where it is nearest, while sequences stand still. Raises as `have_workers`."""
        await self._host.pause(engine)
        workers = self._workers
        if workers is not None and workers.version == image.weight_version:
            await workers.finish(engine)
            await image.label(engine)
            return
        await self._load(image, engine)

    async def _load(self, image: _Image | None, engine: Engine) -> None:
        """Have the workers load what the service keeps, or the model's files."""
        if self._workers is not None:
            await self._workers.drop(engine)
        await (_load_checkpoint(engine) if image is None else image.load(engine))

    def _restore(self, error: BaseException) -> None:
        """Load the serving version again; whatever a failed load left behind must never sample."""
        again = self._host.wait(functools.partial(self._load, self._serving)).exception()
        if again is None:
            log_event(_LOGGER, "weights_restored", {"cause": str(error)}, level=logging.ERROR)
            return
        self._host.fail(f"new weights could not be loaded ({error}), nor the old ones restored ({again})")
        self._host.check()

    def _resume(self) -> None:
        if (error := self._host.wait(_resume).exception()) is not None:
            self._host.fail(f"vLLM did not go on after new weights: {error}")
            self._host.check()


def _shared(weight_version: int, tensors: Mapping[str, torch.Tensor], segment: Segment | None) -> _Image:
    """Weights in shared memory: where they are, if they were received there, or copied."""
    there = segment is not None and [_address(tensor) for tensor in tensors.values()] == [
        _address(tensor) for tensor in segment.tensors
    ]
    if segment is None or not there:
        segment = Segment([tensor.shape for tensor in tensors.values()], [tensor.dtype for tensor in tensors.values()])
        for target, tensor in zip(segment.tensors, tensors.values(), strict=True):
            target.copy_(tensor)
    return _Image(weight_version, segment, dict(zip(tensors, segment.tensors, strict=True)))


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr() if tensor.numel() else 0, tensor.numel() * tensor.element_size()


async def _staged(engine: Engine) -> None:
    while not all(await engine.collective_rpc("ppod_staged")):
        await asyncio.sleep(_POLL_S)


async def _resume(engine: Engine) -> None:
    await engine.resume_generation()


async def _load_checkpoint(engine: Engine) -> None:
    await have_workers(engine, "ppod_load_checkpoint")
