"""What WeightService is asked; tensors are bytes, so it needs no torch. Free of I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import xxhash

from ppod.channel import WEIGHT_CHUNK_BYTES
from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import ModelState, check_state
from ppod.errors import InvalidReply
from ppod.v1 import weights_pb2

WEIGHT_SERVICE = "ppod.v1.WeightService"
PREPARE_METHOD = f"/{WEIGHT_SERVICE}/PrepareWeights"


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


def read_prepared(data: bytes, weight_version: int, tensors: Sequence[WeightTensor]) -> int:
    """Bytes that the server received; raise InvalidReply when they are not those that were sent."""
    reply = parse(weights_pb2.PrepareWeightsResponse, data)
    sent = sum(len(tensor.data) for tensor in tensors)
    if reply.weight_version != weight_version:
        raise InvalidReply("weight_version", str(reply.weight_version), f"{weight_version}, as sent")
    if reply.received_bytes != sent:
        raise InvalidReply("received_bytes", str(reply.received_bytes), f"{sent}, as sent")
    return reply.received_bytes


def commit(core: ClientCore, weight_version: int, timeout_s: float | None) -> Program[float]:
    """Put a prepared version into service; a repeat of a commit that worked works, too."""
    request = weights_pb2.CommitWeightsRequest(weight_version=weight_version)
    job = SingleJob(f"/{WEIGHT_SERVICE}/CommitWeights", request)
    yield from core.ask(job, timeout_s)
    return parse(weights_pb2.CommitWeightsResponse, job.reply).paused_s


def status(core: ClientCore, timeout_s: float | None) -> Program[WeightStatus]:
    """Ask which versions serve and wait."""
    job = SingleJob(f"/{WEIGHT_SERVICE}/GetWeights", weights_pb2.GetWeightsRequest())
    yield from core.ask(job, timeout_s)
    reply = parse(weights_pb2.GetWeightsResponse, job.reply)
    prepared = reply.prepared_version if reply.HasField("prepared_version") else None
    return WeightStatus(check_state(reply.model, core.pin), prepared)


def parts(weight_version: int, tensors: Sequence[WeightTensor]) -> Iterator[weights_pb2.PrepareWeightsRequest]:
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


def encoded_parts(weight_version: int, tensors: Sequence[WeightTensor]) -> Iterator[bytes]:
    """`parts` as bytes."""
    return (part.SerializeToString() for part in parts(weight_version, tensors))
