"""What a worker of an engine receives by broadcasts, without the engine."""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import xxhash
from torch._C._distributed_c10d import PrefixStore

from ppod.errors import InvalidArgument
from ppod.v1 import weights_pb2
from ppod_models.process_groups import BroadcastGroup, GroupError, open_store, wait_for
from ppod_services.core.group_member import GroupMember
from ppod_services.core.side_stream import SideStream
from ppod_services.core.weight_manifest import IncomingGroup, read_manifest
from ppod_services.core.weight_transfer import bytes_of
from ppod_services.generation.vllm_backend.receiver import (
    FAILED,
    GROUP_BROKE,
    NO_MEMORY,
    OTHER_CHECKSUM,
    ChecksumError,
    GroupInfo,
    ReceivedTensor,
    StagedTensors,
    VersionInfo,
    WorkerReceiver,
)
from ppod_services.generation.vllm_backend.segments import Segment
from support.processes import free_ports

CPU = torch.device("cpu")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TENSORS = {
    "empty.first": torch.empty(0, 4),
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
    "odd": torch.arange(9, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.empty(3, 0, dtype=torch.bfloat16),
    "last": torch.randn(300, generator=torch.Generator().manual_seed(2)),
}
DATA = b"".join(bytes_of(tensor).tobytes() for tensor in TENSORS.values())


def segment() -> Segment:
    return Segment([one.shape for one in TENSORS.values()], [one.dtype for one in TENSORS.values()])


def described(offsets: Sequence[int]) -> list[ReceivedTensor]:
    return [
        (name, NAMES[one.dtype], tuple(one.shape), xxhash.xxh3_64_intdigest(bytes_of(one).tobytes()), offset)
        for (name, one), offset in zip(TENSORS.items(), offsets, strict=True)
    ]


def flat(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def assert_whole(found: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("bucket", [1, 3, 140, 141, len(DATA)])
def test_bytes_become_tensors_wherever_they_are_cut(bucket: int) -> None:
    kept = segment()
    memory = np.zeros(kept.offsets[-1] + TENSORS["last"].nbytes, np.uint8)
    staged = StagedTensors(described(kept.offsets), CPU, memory)
    assert staged.total_bytes == len(DATA)
    for begin in range(0, len(DATA), bucket):
        staged.write(flat(DATA[begin : begin + bucket]))
    assert_whole(staged.tensors)
    for tensor, offset in zip(TENSORS.values(), kept.offsets, strict=True):
        assert bytes(memory[offset : offset + tensor.nbytes]) == bytes_of(tensor).tobytes()


@pytest.mark.parametrize(("at", "name"), [(0, "matrix"), (139, "matrix"), (140, "odd"), (len(DATA) - 1, "last")])
def test_a_damaged_byte_is_found_with_its_tensor(at: int, name: str) -> None:
    staged = StagedTensors(described(segment().offsets), CPU, None)
    with pytest.raises(ChecksumError) as raised:
        staged.write(flat(DATA[:at] + bytes([DATA[at] ^ 64]) + DATA[at + 1 :]))
    found, expected = raised.value.args[1:]
    assert raised.value.args[0] == name
    assert found != expected


def test_a_version_that_has_no_room_leaves_what_it_had_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    had_room: list[weakref.ref[torch.Tensor]] = []
    held: list[bool] = []
    empty = torch.empty

    def nearly_full(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if len(had_room) == 2:
            raise torch.OutOfMemoryError("full")
        made = empty(shape, dtype=dtype, device=device)
        had_room.append(weakref.ref(made))
        return made

    def give_back(_: SideStream) -> None:
        held.extend(one() is not None for one in had_room)

    kept = segment()
    receiver = WorkerReceiver(CPU, 1)
    receiver.join(GroupInfo("g", "127.0.0.1:1", "gloo", 1, 3, 64, 3.0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", nearly_full)
        patch.setattr(SideStream, "give_back", give_back)
        receiver.begin(VersionInfo(1, described(kept.offsets), kept.path))
        receiver.wait()
    assert receiver.outcome() == (NO_MEMORY, "full")
    assert held == [False, False]


class Sender:
    """Rank 0 of groups with two workers."""

    def __init__(self) -> None:
        [self.port] = free_ports(1)
        self._store = open_store("127.0.0.1", self.port, master=True, timeout_s=5)
        self._prefix = PrefixStore("ppod/g", self._store)
        self.members: BroadcastGroup | None = None

    @property
    def group(self) -> GroupInfo:
        return GroupInfo("g", f"127.0.0.1:{self.port}", "gloo", 1, 3, 64, 3.0)

    def meet(self, version: int, epoch: int) -> list[bytes]:
        """Wait for the workers, and make the group of the epoch; the epochs that they were in."""
        found = [wait_for(self._prefix, f"{version}/joined/{rank}", 5) for rank in (1, 2)]
        self._prefix.set(f"{version}/go", str(epoch))
        if found != [str(epoch).encode()] * 2:
            self.members = BroadcastGroup("gloo", PrefixStore(str(epoch), self._prefix), 0, 3, 5)
        return found

    def give_up(self, version: int) -> None:
        self._prefix.set(f"{version}/go", "0")

    def send(self, data: bytes = DATA) -> None:
        assert self.members is not None
        for begin in range(0, len(data), 64):
            self.members.finish(self.members.broadcast(flat(data[begin : begin + 64].ljust(64, b"\0"))))


@contextmanager
def workers(group: GroupInfo) -> Generator[list[WorkerReceiver]]:
    both = [WorkerReceiver(CPU, number) for number in range(2)]
    for worker in both:
        worker.join(group)
    yield both
    for worker in both:
        worker.close()


def begin(both: list[WorkerReceiver], version: int) -> Segment:
    kept = segment()
    for worker in both:
        worker.begin(VersionInfo(version, described(kept.offsets), kept.path))
    return kept


def test_workers_are_ranks_of_one_group_and_the_first_fills_the_segment() -> None:
    sender = Sender()
    with workers(sender.group) as both:
        for version, epochs in ((4, [b"0", b"0"]), (5, [b"1", b"1"])):
            kept = begin(both, version)
            assert [worker.outcome() for worker in both] == [None, None]
            assert sender.meet(version, 1) == epochs
            sender.send()
            for worker in both:
                assert_whole(dict(worker.take()))
                assert not worker.outcome()
                worker.drop()
                with pytest.raises(ValueError, match="none was begun"):
                    worker.take()
            assert_whole(dict(zip(TENSORS, kept.tensors, strict=True)))


def test_what_goes_wrong_is_told_and_the_next_version_comes_by_a_new_group() -> None:
    sender = Sender()
    with workers(sender.group) as both:
        begin(both, 4)
        sender.meet(4, 1)
        damaged = bytes([DATA[0] ^ 1]) + DATA[1:]
        with pytest.raises(GroupError):
            # The first buckets may still fit into the sockets' buffers.
            sender.send(damaged * 2)
        for worker in both:
            worker.wait()
            assert [worker.outcome()[0], worker.outcome()[1]] == [OTHER_CHECKSUM, "matrix"]  # pyright: ignore
            with pytest.raises(ValueError, match="checksum matrix"):
                worker.take()
        begin(both, 5)
        sender.give_up(5)
        for worker in both:
            worker.wait()
            assert worker.outcome() == (GROUP_BROKE, "the sender gave up")
        begin(both, 6)
        assert sender.meet(6, 2) == [b"0", b"0"]
        sender.send()
        for worker in both:
            assert_whole(dict(worker.take()))


def test_what_is_on_its_way_can_be_dropped() -> None:
    sender = Sender()
    with workers(sender.group) as both:
        begin(both, 4)
        sender.meet(4, 1)
        sender.send(DATA[:64])
        for worker in both:
            worker.drop()
            assert worker.outcome() == ()


def test_a_sender_that_was_not_met_yet_is_not_waited_for_when_its_version_is_dropped() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        workers(GroupInfo("g", f"127.0.0.1:{silent.getsockname()[1]}", "gloo", 1, 3, 64, 60.0)) as both,
    ):
        begin(both, 4)
        begun = time.monotonic()
        for worker in both:
            worker.drop()
        assert time.monotonic() - begun < 5
        begin(both, 5)
        time.sleep(0.2)
        assert [worker.outcome() for worker in both] == [None, None], "the next one is looked for again"


def test_a_store_that_is_gone_is_a_broken_group_when_it_is_told_and_when_it_is_asked() -> None:
    sender = Sender()
    address = f"127.0.0.1:{sender.port}"
    member = GroupMember(IncomingGroup("g", address, "gloo", 1, 3, 64), 1, 3.0, threading.Event())
    del sender
    # To a closed connection one write succeeds.
    for words in ("1/go was not told", "1/joined/1 could not be told"):
        with pytest.raises(GroupError, match=words):
            next(member.buckets(1, 64))


def test_whatever_else_goes_wrong_is_told() -> None:
    worker = WorkerReceiver(CPU, 0)
    worker.begin(VersionInfo(1, described(segment().offsets), "/proc/self/fd/no"))
    worker.wait()
    outcome = worker.outcome()
    assert outcome is not None
    assert outcome[0] == FAILED
    assert "FileNotFoundError" in outcome[1]
    kept = segment()
    worker.join(GroupInfo("g", f"127.0.0.1:{free_ports(1)[0]}", "gloo", 1, 2, 64, 0.3))
    worker.begin(VersionInfo(1, described(kept.offsets), kept.path))
    worker.wait()
    outcome = worker.outcome()
    assert outcome is not None
    assert outcome[0] == GROUP_BROKE
    assert "cannot be reached" in outcome[1]


@pytest.mark.parametrize(("rank", "ranks", "fits"), [(1, 0, True), (1, 2, True), (2, 2, False), (3, 0, False)])
def test_all_ranks_of_a_server_are_in_the_group(rank: int, ranks: int, fits: bool) -> None:
    manifest = weights_pb2.WeightManifest(weight_version=1)
    group = manifest.collective
    group.name, group.address, group.backend, group.bucket_bytes = "group", "trainer:1", "gloo", 2**20
    group.rank, group.ranks, group.world_size = rank, ranks, 3
    if fits:
        read = read_manifest(manifest).collective
        assert read is not None
        assert (read.rank, read.ranks) == (rank, ranks or 1)
    else:
        with pytest.raises(InvalidArgument, match=r"manifest\.collective\.rank"):
            read_manifest(manifest)
