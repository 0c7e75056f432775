"""Client of WeightService: sends tensors it is handed as bytes, so it needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import xxhash

from ppod.channel import WEIGHT_CHUNK_BYTES
from ppod.client.base import ModelState, ServiceClient
from ppod.v1 import weights_pb2, weights_pb2_grpc


class TensorDtype(Enum):
    """Data types that travel."""

    FLOAT32 = weights_pb2.TENSOR_DTYPE_FLOAT32
    BFLOAT16 = weights_pb2.TENSOR_DTYPE_BFLOAT16
    FLOAT16 = weights_pb2.TENSOR_DTYPE_FLOAT16

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is TensorDtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """One tensor to send: `data` is a flat view of its bytes, row-major, little-endian."""

    name: str
    dtype: TensorDtype
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class WeightStatus:
    """Which version serves, and which one waits for its commit."""

    state: ModelState
    prepared_version: int | None


class WeightClient(ServiceClient):
    """Replaces a service's weights in two phases."""

    service_name = "ppod.v1.WeightService"

    def prepare(self, weight_version: int, tensors: Sequence[WeightTensor], *, timeout_s: float | None = None) -> int:
        """Send all tensors and wait until the server verified them. Returns the number of bytes sent.

        Raises:
            InvalidArgument: a name, shape, dtype or checksum does not fit. FailedPrecondition: an old version.
        """
        stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        with self._rpc("PrepareWeights"):
            reply = stub.PrepareWeights(_parts(weight_version, tensors), timeout=timeout_s or self.timeout_s)
        return reply.received_bytes

    def commit(self, weight_version: int, *, timeout_s: float | None = None) -> float:
        """Put the prepared version into service. Returns the seconds for which no batch could start."""
        stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        with self._rpc("CommitWeights"):
            reply = stub.CommitWeights(
                weights_pb2.CommitWeightsRequest(weight_version=weight_version), timeout=timeout_s or self.timeout_s
            )
        return reply.paused_s

    def status(self, *, timeout_s: float | None = None) -> WeightStatus:
        """Ask which versions serve and wait."""
        stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        with self._rpc("GetWeights"):
            reply = stub.GetWeights(weights_pb2.GetWeightsRequest(), timeout=timeout_s or self.timeout_s)
        prepared = reply.prepared_version if reply.HasField("prepared_version") else None
        return WeightStatus(self._check_state(reply.model), prepared)


def _parts(weight_version: int, tensors: Sequence[WeightTensor]) -> Iterator[weights_pb2.PrepareWeightsRequest]:
    """The manifest, then the bytes of all tensors, cut into chunks that span small tensors."""
    manifest = weights_pb2.WeightManifest(weight_version=weight_version)
    for tensor in tensors:
        manifest.tensors.add(
            name=tensor.name,
            dtype=tensor.dtype.value,
            shape=tensor.shape,
            xxh3=xxhash.xxh3_64_intdigest(tensor.data),
        )
    yield weights_pb2.PrepareWeightsRequest(manifest=manifest)
    buffer = bytearray()
    for tensor in tensors:
        offset = 0
        while offset < len(tensor.data):
            taken = tensor.data[offset : offset + WEIGHT_CHUNK_BYTES - len(buffer)]
            offset += len(taken)
            buffer += taken
            if len(buffer) == WEIGHT_CHUNK_BYTES:
                yield weights_pb2.PrepareWeightsRequest(chunk=bytes(buffer))
                buffer.clear()
    if buffer:
        yield weights_pb2.PrepareWeightsRequest(chunk=bytes(buffer))
