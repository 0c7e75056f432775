"""What WeightService is asked; tensors are bytes, so it needs no torch. Free of I/O."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum

import xxhash

from ppod.channel import WEIGHT_CHUNK_BYTES
from ppod.client.core import ClientCore, Program, SingleJob, parse
from ppod.client.identity import ModelState, check_state
from ppod.errors import InvalidReply, PpodError, from_status
from ppod.v1 import weights_pb2
from ppod.weight_changes import TensorEncoding

WEIGHT_SERVICE = "ppod.v1.WeightService"
PREPARE_METHOD = f"/{WEIGHT_SERVICE}/PrepareWeights"

_CHUNK_TAG = bytes([weights_pb2.PrepareWeightsRequest.CHUNK_FIELD_NUMBER << 3 | 2])
_HASHERS = min(4, os.cpu_count() or 1)


class TensorDtype(Enum):
    """Data types that travel."""

    FLOAT32 = weights_pb2.TENSOR_DTYPE_FLOAT32
    BFLOAT16 = weights_pb2.TENSOR_DTYPE_BFLOAT16
    FLOAT16 = weights_pb2.TENSOR_DTYPE_FLOAT16

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is TensorDtype.FLOAT32 else 2


class WeightPause(Enum):
    """What a commit does about sequences that are being generated.

    WAIT: they finish under the old version first. KEEP: they go on under the new one. ABORT: they are returned
    unfinished.
    """

    WAIT = weights_pb2.WEIGHT_PAUSE_WAIT
    KEEP = weights_pb2.WEIGHT_PAUSE_KEEP
    ABORT = weights_pb2.WEIGHT_PAUSE_ABORT


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """One tensor to send.

    Attributes:
        name: as the model, or the adapter, names it.
        dtype: data type of the whole tensor.
        shape: its shape.
        data: a flat view of the bytes that travel: row-major, little-endian, or encoded.
        encoding: how they travel.
        xxh3: XXH3-64 of the whole tensor's bytes; None: that of `data`, found as it is sent.
        arriving: waits until `data` holds the bytes, and gives their checksum; None: they are there.
    """

    name: str
    dtype: TensorDtype
    shape: tuple[int, ...]
    data: memoryview
    encoding: TensorEncoding = TensorEncoding.DENSE
    xxh3: int | None = None
    arriving: Callable[[], int] | None = None


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """What adapter the tensors of a push are; see LoraAdapter in weights.proto."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    rank_stabilized: bool = False


@dataclass(frozen=True, slots=True)
class RelayHop:
    """A further server that the weights are relayed to, and those that it relays them to.

    Attributes:
        target: its administration port.
        hops: behind it.
        shares_directory: it gets whole weights by a file, once the server before it has them whole.
    """

    target: str
    hops: tuple[RelayHop, ...] = ()
    shares_directory: bool = False


@dataclass(frozen=True, slots=True)
class CollectiveGroup:
    """A process group that carries the bytes of a push; see CollectiveGroup in weights.proto.

    Attributes:
        name: of the group.
        address: the sender's TCPStore, `host:port`.
        backend: `nccl` or `gloo`.
        ranks: of each server, by its target, from 1 without gaps; the sender is 0. See `WeightStatus.collective_ranks`.
        bucket_bytes: what is broadcast at once.
    """

    name: str
    address: str
    backend: str
    ranks: Mapping[str, range]
    bucket_bytes: int

    @property
    def world_size(self) -> int:
        """Number of ranks, the sender's among them."""
        return 1 + sum(map(len, self.ranks.values()))


@dataclass(frozen=True, slots=True)
class WeightPush:
    """One version on its way.

    Attributes:
        weight_version: what the weights will be; greater than the serving version.
        tensors: all of them.
        base_version: what encoded tensors or an adapter refer to; None where there are neither.
        adapter: what the tensors belong to; None: the model itself.
        uri: a shared file that holds the bytes already; empty: they are sent.
        relay: servers that get the same from this one.
        collective: a process group that brings the bytes; None: they come otherwise.
        push_id: the sender's name for it, by which its commit is of no other's; empty: it has none.
    """

    weight_version: int
    tensors: Sequence[WeightTensor]
    base_version: int | None = None
    adapter: LoraAdapter | None = None
    uri: str = ""
    relay: tuple[RelayHop, ...] = ()
    collective: CollectiveGroup | None = None
    push_id: str = ""

    @property
    def wire_bytes(self) -> int:
        """Bytes of tensors that travel."""
        return sum(len(tensor.data) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class ReplicaOutcome:
    """What became of one server; `error` None: the version is prepared there."""

    target: str
    error: PpodError | None


@dataclass(frozen=True, slots=True)
class PreparedWeights:
    """The reply to a push.

    Attributes:
        received_bytes: bytes of tensors that the server received; of a relay's first server.
        receive_s: seconds that it took there.
        replicas: every server of the relay, the first one first; without a relay that one alone.
    """

    received_bytes: int
    receive_s: float
    replicas: tuple[ReplicaOutcome, ...]


@dataclass(frozen=True, slots=True)
class WeightStatus:
    """Which version serves, and which one waits for its commit.

    Attributes:
        state: what serves now.
        prepared_version: what waits for its commit.
        base_version: version of the whole weights in service, below an adapter where one serves.
        held_uris: shared files that serve or wait; whoever writes to one damages them.
        collective_ranks: how many ranks the server takes in a `CollectiveGroup`.
        relay_directory_id: of the directory that it relays by; those with the same one see its files. Empty: none.
        push_id: of the push that brought what serves; empty: it had none, or nothing was pushed.
    """

    state: ModelState
    prepared_version: int | None
    base_version: int = 0
    held_uris: tuple[str, ...] = ()
    collective_ranks: int = 1
    relay_directory_id: str = ""
    push_id: str = ""


def read_prepared(data: bytes, target: str, push: WeightPush) -> PreparedWeights:
    """What became of a push; raise InvalidReply when it is another one that the server received."""
    reply = parse(weights_pb2.PrepareWeightsResponse, data)
    if reply.weight_version != push.weight_version:
        raise InvalidReply("weight_version", str(reply.weight_version), f"{push.weight_version}, as sent")
    outcomes = tuple(
        ReplicaOutcome(one.target or target, from_status(one.code, one.message, one.status)) for one in reply.replicas
    )
    if bool(push.relay) != bool(outcomes):
        expected = "what became of every server" if push.relay else "none: nothing was to be relayed"
        raise InvalidReply("replicas", f"{len(outcomes)} results", expected)
    outcomes = outcomes or (ReplicaOutcome(target, None),)
    if outcomes[0].error is None and reply.received_bytes != push.wire_bytes:
        raise InvalidReply("received_bytes", str(reply.received_bytes), f"{push.wire_bytes}, as sent")
    return PreparedWeights(reply.received_bytes, reply.receive_s, outcomes)


def commit(
    core: ClientCore, weight_version: int, pause: WeightPause, push_id: str, timeout_s: float | None
) -> Program[float]:
    """Put a prepared version into service; a repeat of a commit that worked works, too."""
    request = weights_pb2.CommitWeightsRequest(weight_version=weight_version, pause=pause.value, push_id=push_id)
    job = SingleJob(f"/{WEIGHT_SERVICE}/CommitWeights", request)
    yield from core.ask(job, timeout_s)
    reply = parse(weights_pb2.CommitWeightsResponse, job.reply)
    serving = check_state(reply.model, core.pin).weight_version
    if serving != weight_version:
        found = f"{serving} in service after the commit; does somebody else push to this server?"
        raise InvalidReply("model.weight_version", found, str(weight_version))
    return reply.paused_s


def status(core: ClientCore, timeout_s: float | None) -> Program[WeightStatus]:
    """Ask which versions serve and wait."""
    job = SingleJob(f"/{WEIGHT_SERVICE}/GetWeights", weights_pb2.GetWeightsRequest())
    yield from core.ask(job, timeout_s)
    reply = parse(weights_pb2.GetWeightsResponse, job.reply)
    prepared = reply.prepared_version if reply.HasField("prepared_version") else None
    return WeightStatus(
        check_state(reply.model, core.pin),
        prepared,
        reply.base_version,
        tuple(reply.held_uris),
        reply.collective_ranks or 1,
        reply.relay_directory_id,
        reply.push_id,
    )


def with_checksums(tensors: Sequence[WeightTensor]) -> list[WeightTensor]:
    """The tensors, all there, each with its checksum; several are hashed at once."""
    if all(tensor.xxh3 is not None for tensor in tensors):
        return list(tensors)
    with ThreadPoolExecutor(_HASHERS, thread_name_prefix="checksums") as pool:
        return list(pool.map(_with_checksum, tensors))


def messages(push: WeightPush, target: str = "") -> Iterator[bytes]:
    """The messages of a push: the manifest, the bytes of all tensors, and checksums where the manifest has none.

    The bytes are cut into chunks that span small tensors. `target` is whom they are for, where that decides a rank.
    """
    if push.uri or push.collective is not None:
        push = replace(push, tensors=with_checksums(push.tensors))
    yield weights_pb2.PrepareWeightsRequest(manifest=_manifest(push, target)).SerializeToString()
    if push.uri or push.collective is not None:
        return
    checksums: list[int] = []
    pieces: list[memoryview] = []
    size = 0
    for tensor in push.tensors:
        offset = 0
        checksum = xxhash.xxh3_64()
        found = tensor.xxh3 if tensor.arriving is None else tensor.arriving()
        while offset < len(tensor.data):
            taken = tensor.data[offset : offset + WEIGHT_CHUNK_BYTES - size]
            offset += len(taken)
            size += len(taken)
            pieces.append(taken)
            if found is None:
                # Just before it is copied: so it is read from memory once.
                checksum.update(taken)
            if size == WEIGHT_CHUNK_BYTES:
                yield _chunk(pieces, size)
                pieces, size = [], 0
        checksums.append(checksum.intdigest() if found is None else found)
    if pieces:
        yield _chunk(pieces, size)
    if _checksums_follow(push):
        following = weights_pb2.WeightChecksums(xxh3=checksums)
        yield weights_pb2.PrepareWeightsRequest(checksums=following).SerializeToString()


def _checksums_follow(push: WeightPush) -> bool:
    return any(tensor.xxh3 is None for tensor in push.tensors)


def _chunk(pieces: Sequence[memoryview], size: int) -> bytes:
    """A PrepareWeightsRequest with these bytes as its chunk, in one copy where protobuf would make three."""
    length = bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"".join((_CHUNK_TAG, length, *pieces))


def _with_checksum(tensor: WeightTensor) -> WeightTensor:
    if tensor.arriving is not None:
        return replace(tensor, xxh3=tensor.arriving(), arriving=None)
    return tensor if tensor.xxh3 is not None else replace(tensor, xxh3=xxhash.xxh3_64_intdigest(tensor.data))


def _manifest(push: WeightPush, target: str) -> weights_pb2.WeightManifest:
    manifest = weights_pb2.WeightManifest(
        weight_version=push.weight_version,
        base_version=push.base_version,
        uri=push.uri,
        relay=[_hop(hop) for hop in push.relay],
        checksums_follow=_checksums_follow(push),
        push_id=push.push_id,
    )
    if push.adapter is not None:
        manifest.adapter.rank = push.adapter.rank
        manifest.adapter.alpha = push.adapter.alpha
        manifest.adapter.rank_stabilized = push.adapter.rank_stabilized
        manifest.adapter.target_modules.extend(push.adapter.target_modules)
    if (group := push.collective) is not None:
        manifest.collective.name = group.name
        manifest.collective.address = group.address
        manifest.collective.backend = group.backend
        manifest.collective.rank = group.ranks[target].start
        manifest.collective.ranks = len(group.ranks[target])
        manifest.collective.world_size = group.world_size
        manifest.collective.bucket_bytes = group.bucket_bytes
    for tensor in push.tensors:
        spec = manifest.tensors.add(
            name=tensor.name,
            dtype=tensor.dtype.value,
            shape=tensor.shape,
            xxh3=tensor.xxh3,
            encoding=tensor.encoding.value,
        )
        if tensor.encoding is not TensorEncoding.DENSE:
            spec.encoded_bytes = len(tensor.data)
    return manifest


def _hop(hop: RelayHop) -> weights_pb2.RelayHop:
    hops = [_hop(inner) for inner in hop.hops]
    return weights_pb2.RelayHop(target=hop.target, hops=hops, shares_directory=hop.shares_directory)
