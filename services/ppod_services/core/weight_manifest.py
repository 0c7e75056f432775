"""What a transfer of weights says that it will bring. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ppod.errors import InvalidArgument
from ppod.v1 import weights_pb2
from ppod.weight_changes import TensorEncoding

_DTYPES = {
    weights_pb2.TENSOR_DTYPE_FLOAT32: "float32",
    weights_pb2.TENSOR_DTYPE_BFLOAT16: "bfloat16",
    weights_pb2.TENSOR_DTYPE_FLOAT16: "float16",
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element of the data types that travel."""

Layout = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Names, data types and shapes of tensors, in their order."""

_ENCODINGS = {one.value: one for one in TensorEncoding} | {
    weights_pb2.TENSOR_ENCODING_UNSPECIFIED: TensorEncoding.DENSE
}
_BUCKET_BYTES = (64 * 1024, 1024**3)
_PUSH_ID_LENGTH = 64


class IncomingTensor(NamedTuple):
    """What one tensor of a transfer must turn out to be. A tuple, as there are hundreds to make before a push goes on.

    Attributes:
        name: as the model, or the adapter, names it.
        dtype: a key of `ITEM_BYTES`.
        shape: its shape; empty is a scalar.
        xxh3: XXH3-64 of the bytes of the whole tensor; None: it comes after all bytes.
        encoding: how its bytes travel.
        encoded_bytes: how many travel, where it is not dense.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    xxh3: int | None
    encoding: TensorEncoding = TensorEncoding.DENSE
    encoded_bytes: int = 0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def wire_bytes(self) -> int:
        """Bytes that travel."""
        return self.dense_bytes if self.encoding is TensorEncoding.DENSE else self.encoded_bytes


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A low-rank change of some linear layers (Hu et al., 2021): W + scaling * B @ A.

    Attributes:
        rank: rows of each A [rank, in], columns of each B [out, rank].
        scaling: factor of the product.
        target_modules: full names of the layers in the base model.
    """

    rank: int
    scaling: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IncomingGroup:
    """The process group that brings the bytes.

    Attributes:
        name: of the group.
        address: the sender's store, `host:port`.
        backend: of torch.distributed.
        rank, world_size: this server's first, and how many there are.
        bucket_bytes: what is broadcast at once.
        ranks: how many from `rank` on are this server's.
    """

    name: str
    address: str
    backend: Literal["nccl", "gloo"]
    rank: int
    world_size: int
    bucket_bytes: int
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class IncomingManifest:
    """All that one transfer brings.

    Attributes:
        weight_version: what the weights will be.
        tensors: in the order of their bytes.
        base_version: version that changes or an adapter refer to; checked where it is given.
        adapter: what the tensors belong to; None: the model itself.
        uri: file that holds the bytes; empty where there is none.
        collective: process group that brings the bytes; with neither they come in chunks.
        push_id: the sender's name for the push; empty where it has none.
    """

    weight_version: int
    tensors: tuple[IncomingTensor, ...]
    base_version: int | None = None
    adapter: LoraAdapter | None = None
    uri: str = ""
    collective: IncomingGroup | None = None
    push_id: str = ""

    @property
    def layout(self) -> Layout:
        """What the tensors are, whatever they hold."""
        return tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors)

    @property
    def wire_bytes(self) -> int:
        """Bytes of tensors that travel."""
        return sum(tensor.wire_bytes for tensor in self.tensors)

    @property
    def encoded(self) -> bool:
        """Whether some tensor comes as its changes."""
        return any(tensor.encoding is not TensorEncoding.DENSE for tensor in self.tensors)


def read_manifest(message: weights_pb2.WeightManifest) -> IncomingManifest:
    """The manifest that a message holds.

    Raises:
        InvalidArgument: a data type or an encoding is unknown, or a base version is missing.
    """
    adapter = _read_adapter(message.adapter) if message.HasField("adapter") else None
    manifest = IncomingManifest(
        weight_version=message.weight_version,
        tensors=tuple(_read_tensor(spec, message.checksums_follow) for spec in message.tensors),
        base_version=message.base_version if message.HasField("base_version") else None,
        adapter=adapter,
        uri=message.uri,
        collective=_read_group(message) if message.HasField("collective") else None,
        push_id=message.push_id,
    )
    if len(manifest.push_id) > _PUSH_ID_LENGTH:
        raise InvalidArgument("manifest.push_id", f"{len(manifest.push_id)} characters", f"at most {_PUSH_ID_LENGTH}")
    if adapter is not None and manifest.encoded:
        raise InvalidArgument("manifest.tensors.encoding", "changes of an adapter's tensors", "dense tensors")
    if message.checksums_follow and (manifest.uri or manifest.collective is not None):
        raise InvalidArgument("manifest.checksums_follow", "true", "checksums in the manifest, where no chunks follow")
    if manifest.base_version is None and (adapter is not None or manifest.encoded):
        raise InvalidArgument("manifest.base_version", "none", "the version that changes or the adapter are against")
    return manifest


def _read_group(message: weights_pb2.WeightManifest) -> IncomingGroup:
    group = message.collective
    field = "manifest.collective"
    if message.uri or message.relay:
        raise InvalidArgument(field, "a group beside a file or a relay", "one way for the bytes to come")
    if any(_is_encoded(spec) for spec in message.tensors):
        raise InvalidArgument(f"{field}", "changes of tensors", "dense tensors")
    backend = group.backend
    if backend not in ("nccl", "gloo"):
        raise InvalidArgument(f"{field}.backend", repr(backend), "nccl or gloo")
    ranks = group.ranks or 1
    if not 1 <= group.rank <= group.world_size - ranks:
        raise InvalidArgument(f"{field}.rank", str(group.rank), f"1 to {int(group.world_size) - ranks}")
    low, high = _BUCKET_BYTES
    if not low <= group.bucket_bytes <= high:
        raise InvalidArgument(f"{field}.bucket_bytes", str(group.bucket_bytes), f"{low} to {high}")
    host, _, port = group.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidArgument(f"{field}.address", repr(group.address), "host:port")
    if not group.name:
        raise InvalidArgument(f"{field}.name", "none", "a name of the sender's")
    return IncomingGroup(group.name, group.address, backend, group.rank, group.world_size, group.bucket_bytes, ranks)


def _is_encoded(spec: weights_pb2.TensorSpec) -> bool:
    dense = (weights_pb2.TENSOR_ENCODING_UNSPECIFIED, weights_pb2.TENSOR_ENCODING_DENSE)
    return spec.encoding not in dense


def check_tensors(tensors: Sequence[IncomingTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InvalidArgument unless a manifest names exactly these tensors, in these shapes."""
    seen: set[str] = set()
    for tensor in tensors:
        shape = shapes.get(tensor.name)
        if shape is None:
            raise InvalidArgument("manifest.tensors.name", tensor.name, "a name of the model's parameters")
        if tensor.name in seen:
            raise InvalidArgument("manifest.tensors.name", f"{tensor.name} twice", "each name once")
        seen.add(tensor.name)
        if tensor.shape != shape:
            raise InvalidArgument(f"manifest.tensors.{tensor.name}.shape", str(list(tensor.shape)), str(list(shape)))
        if tensor.encoding is not TensorEncoding.DENSE and tensor.encoded_bytes > tensor.dense_bytes:
            # Nobody gains by it, and it bounds what has to be kept until it is decoded.
            found, most = f"{tensor.encoded_bytes}", f"at most {tensor.dense_bytes}, those of the whole tensor"
            raise InvalidArgument(f"manifest.tensors.{tensor.name}.encoded_bytes", found, most)
    missing = [name for name in shapes if name not in seen]
    if missing:
        raise InvalidArgument("manifest.tensors", f"{len(missing)} missing, first {missing[0]}", f"all {len(shapes)}")


def _read_tensor(spec: weights_pb2.TensorSpec, checksums_follow: bool) -> IncomingTensor:
    dtype = _DTYPES.get(spec.dtype)
    if dtype is None:
        raise InvalidArgument(f"manifest.tensors.{spec.name}.dtype", str(spec.dtype), " or ".join(ITEM_BYTES))
    encoding = _ENCODINGS.get(spec.encoding)
    if encoding is None:
        known = " or ".join(one.name for one in TensorEncoding)
        raise InvalidArgument(f"manifest.tensors.{spec.name}.encoding", str(spec.encoding), known)
    return IncomingTensor(
        name=spec.name,
        dtype=dtype,
        shape=tuple(spec.shape),
        xxh3=None if checksums_follow else spec.xxh3,
        encoding=encoding,
        encoded_bytes=spec.encoded_bytes,
    )


def _read_adapter(message: weights_pb2.LoraAdapter) -> LoraAdapter:
    if message.rank < 1:
        raise InvalidArgument("manifest.adapter.rank", str(message.rank), "1 or more")
    if not message.target_modules:
        raise InvalidArgument("manifest.adapter.target_modules", "none", "the layers that it changes")
    if not math.isfinite(message.alpha):
        raise InvalidArgument("manifest.adapter.alpha", str(message.alpha), "a finite number")
    divisor = math.sqrt(message.rank) if message.rank_stabilized else message.rank
    return LoraAdapter(message.rank, message.alpha / divisor, tuple(message.target_modules))
