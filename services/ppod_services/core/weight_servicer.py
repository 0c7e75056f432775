"""WeightService on the admin port: turns messages into calls of `ServedWeights`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc.aio

from ppod.errors import InvalidArgument
from ppod.v1 import weights_pb2, weights_pb2_grpc
from ppod_services.core.described import Deferred, IncomingTensor, ModelInfo
from ppod_services.core.logs import log_event
from ppod_services.core.weight_store import Install

if TYPE_CHECKING:
    # Importing torch would delay the binding of the ports by seconds.
    from ppod_services.core.weights import ServedWeights, WeightTransfer

_LOGGER = logging.getLogger(__name__)
JobT = TypeVar("JobT")

WEIGHT_SERVICE = weights_pb2.DESCRIPTOR.services_by_name["WeightService"].full_name
_DTYPES = {
    weights_pb2.TENSOR_DTYPE_FLOAT32: "float32",
    weights_pb2.TENSOR_DTYPE_BFLOAT16: "bfloat16",
    weights_pb2.TENSOR_DTYPE_FLOAT16: "float16",
}


class Exclusive(Protocol):
    """Runs a job in the model's thread between two batches."""

    async def exclusive(self, job: Callable[[], JobT]) -> JobT:
        """Run it and return its result."""
        ...


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """The loaded model that new weights go to."""

    info: ModelInfo
    weights: ServedWeights


class WeightServicer(weights_pb2_grpc.WeightServiceServicer):
    """Replaces weights in two phases; see weights.proto."""

    def __init__(self, target: Deferred[WeightTarget], scheduler: Exclusive) -> None:
        self._target = target
        self._scheduler = scheduler

    async def PrepareWeights(
        self,
        request_iterator: AsyncIterator[weights_pb2.PrepareWeightsRequest],
        context: grpc.aio.ServicerContext[weights_pb2.PrepareWeightsRequest, weights_pb2.PrepareWeightsResponse],
    ) -> weights_pb2.PrepareWeightsResponse:
        """Receive, verify and keep aside."""
        weights = self._target.get().weights
        manifest = await _read_manifest(request_iterator)
        specs = [_read_spec(spec) for spec in manifest.tensors]
        # Not in a thread: a caller that went away in between would leave the transfer open for ever.
        transfer = weights.begin(manifest.weight_version, specs)
        staged: Install | None = None
        try:
            await _receive(transfer, request_iterator)
            staged = await asyncio.to_thread(weights.stage, transfer)
        finally:
            # Also reached when the caller goes away: then nothing is kept.
            weights.end(transfer, staged)
        receive_s = time.monotonic() - transfer.started
        log_event(
            _LOGGER,
            "weights_prepared",
            {"version": transfer.weight_version, "bytes": transfer.received_bytes, "seconds": round(receive_s, 3)},
        )
        return weights_pb2.PrepareWeightsResponse(
            weight_version=transfer.weight_version, received_bytes=transfer.received_bytes, receive_s=receive_s
        )

    async def CommitWeights(
        self,
        request: weights_pb2.CommitWeightsRequest,
        context: grpc.aio.ServicerContext[weights_pb2.CommitWeightsRequest, weights_pb2.CommitWeightsResponse],
    ) -> weights_pb2.CommitWeightsResponse:
        """Swap between two batches."""
        target = self._target.get()
        paused_s = await self._scheduler.exclusive(lambda: target.weights.commit(request.weight_version))
        log_event(_LOGGER, "weights_committed", {"version": request.weight_version, "seconds": round(paused_s, 6)})
        return weights_pb2.CommitWeightsResponse(model=target.info.state(request.weight_version), paused_s=paused_s)

    async def GetWeights(
        self,
        request: weights_pb2.GetWeightsRequest,
        context: grpc.aio.ServicerContext[weights_pb2.GetWeightsRequest, weights_pb2.GetWeightsResponse],
    ) -> weights_pb2.GetWeightsResponse:
        """Tell which versions serve and wait."""
        target = self._target.get()
        return weights_pb2.GetWeightsResponse(
            model=target.info.state(target.weights.version), prepared_version=target.weights.prepared_version
        )


async def _read_manifest(parts: AsyncIterator[weights_pb2.PrepareWeightsRequest]) -> weights_pb2.WeightManifest:
    async for part in parts:
        if part.WhichOneof("part") == "manifest":
            return part.manifest
        raise InvalidArgument("part", part.WhichOneof("part") or "nothing", "the manifest in the first message")
    raise InvalidArgument("part", "an empty stream", "the manifest in the first message")


async def _receive(transfer: WeightTransfer, parts: AsyncIterator[weights_pb2.PrepareWeightsRequest]) -> None:
    """Write each chunk in a thread: copying and hashing megabytes would hold up every other call."""
    async for part in parts:
        if part.WhichOneof("part") != "chunk":
            raise InvalidArgument("part", part.WhichOneof("part") or "nothing", "a chunk in every later message")
        await asyncio.to_thread(transfer.write, part.chunk)


def _read_spec(spec: weights_pb2.TensorSpec) -> IncomingTensor:
    dtype = _DTYPES.get(spec.dtype, "unspecified")
    return IncomingTensor(name=spec.name, dtype=dtype, shape=tuple(spec.shape), xxh3=spec.xxh3)
