"""Weights that a worker receives by a group's broadcasts onto its own device, while it serves. Free of vLLM."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from ppod_models.loading import DTYPES
from ppod_models.process_groups import GroupBackend, GroupError, on_host
from ppod_services.core.group_member import GroupMember
from ppod_services.core.side_stream import SideStream
from ppod_services.core.weight_manifest import IncomingGroup
from ppod_services.generation.vllm_backend.room import need_room

GROUP_BROKE = "group"
OTHER_CHECKSUM = "checksum"
NO_MEMORY = "memory"
FAILED = "failed"

Outcome = Sequence[str]
"""Empty where all is well; else one of the words above, and what it is about: see `WorkerReceiver.outcome`."""

ReceivedTensor = tuple[str, str, tuple[int, ...], int, int]
"""Name, data type, shape, XXH3-64 and offset in the service's segment of a tensor that will come."""


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """Which group to join; as `IncomingGroup`, with `rank` that of the engine's first worker."""

    name: str
    address: str
    backend: GroupBackend
    rank: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What comes next.

    Attributes:
        weight_version: what the weights will be.
        tensors: in the order of their bytes.
        segment: where the first worker puts them for the service, which keeps one copy of what serves.
    """

    weight_version: int
    tensors: Sequence[ReceivedTensor]
    segment: str


class ChecksumError(Exception):
    """A tensor has other bytes than were sent: its name, the checksum found and the one expected."""


class StagedTensors:
    """Tensors on a device that fill up from a stream of bytes, each verified as it is whole.

    Args:
        tensors: what comes.
        device: where they lie.
        copy: the service's segment, where this worker is to fill it.
    """

    def __init__(self, tensors: Sequence[ReceivedTensor], device: torch.device, copy: np.ndarray | None) -> None:
        self.tensors = {
            name: torch.empty(tuple(shape), dtype=DTYPES[dtype], device=device) for name, dtype, shape, _, _ in tensors
        }
        self._flat = [tensor.view(-1).view(torch.uint8) for tensor in self.tensors.values()]
        self._expected = [(name, xxh3) for name, _, _, xxh3, _ in tensors]
        self._offsets = [offset for *_, offset in tensors]
        self._copy = copy
        self._index = self._filled = 0
        self._hash = xxhash.xxh3_64()
        self._skip_full()

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(map(len, self._flat))

    def write(self, bucket: torch.Tensor) -> None:
        """Take the next bytes: a flat uint8 tensor on the device. Raises ChecksumError."""
        # Also the bytes that the checksum is made of come from the device, not past it.
        host = on_host(bucket).numpy()
        begin = 0
        while begin < len(host):
            target = self._flat[self._index]
            taken = min(len(host) - begin, len(target) - self._filled)
            target[self._filled : self._filled + taken].copy_(bucket[begin : begin + taken])
            part = host[begin : begin + taken]
            self._hash.update(part.data)
            if self._copy is not None:
                start = self._offsets[self._index] + self._filled
                self._copy[start : start + taken] = part
            begin += taken
            self._filled += taken
            self._skip_full()

    def _skip_full(self) -> None:
        """Verify the tensor that is whole, and those without any bytes behind it."""
        while self._index < len(self._flat) and self._filled == len(self._flat[self._index]):
            name, expected = self._expected[self._index]
            found = self._hash.intdigest()
            if found != expected:
                raise ChecksumError(name, f"{found:016x}", f"{expected:016x}")
            self._index, self._filled = self._index + 1, 0
            self._hash.reset()


class WorkerReceiver:
    """Receives one version at a time in a thread of its own. Its methods are for the worker's own thread.

    Args:
        device: the worker's.
        worker: its number among the engine's, from 0.
    """

    def __init__(self, device: torch.device, worker: int) -> None:
        self._device = device
        self._side = SideStream(device)
        self._worker = worker
        self.spared_bytes = 0
        """What the engine may need of the device's memory beside what is received."""
        self._group: IncomingGroup | None = None
        self._timeout_s = 0.0
        self._member: GroupMember | None = None
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()  # what the thread receives
        self._staged: StagedTensors | None = None
        self._outcome: Outcome = ()
        self.weight_version = 0
        """Of what was begun last."""

    def join(self, info: GroupInfo) -> None:
        """Receive from this group from now on; it is met when a version comes."""
        rank = info.rank + self._worker
        group = IncomingGroup(info.name, info.address, info.backend, rank, info.world_size, info.bucket_bytes)
        if self._group is None or self._group.name != group.name:
            self._leave()
        self._group, self._timeout_s = group, info.timeout_s

    def begin(self, version: VersionInfo) -> None:
        """Receive a version while the worker goes on."""
        self.drop()
        self.weight_version = version.weight_version
        self._thread = threading.Thread(target=self._receive, args=(version,), name="weights", daemon=True)
        self._thread.start()

    def outcome(self) -> Outcome | None:
        """What became of the version; None: it is still on its way."""
        return None if self._thread is not None and self._thread.is_alive() else self._outcome

    def take(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of all that was received; raise ValueError where that is not all of a version."""
        self.wait()
        if self._staged is None or self._outcome:
            raise ValueError(f"no whole version was received: {' '.join(self._outcome) or 'none was begun'}")
        return iter(self._staged.tensors.items())

    def wait(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def drop(self) -> None:
        """Forget what was received; what is on its way is given up."""
        if self._thread is not None and self._thread.is_alive():
            self._dropped.set()
            self._leave()
        self.wait()
        self._dropped.clear()
        self._thread = self._staged = None
        self._outcome = ()

    def close(self) -> None:
        """Forget all, and leave the group."""
        self.drop()
        self._leave()

    def _leave(self) -> None:
        member, self._member = self._member, None
        if member is not None:
            member.close()

    def _receive(self, version: VersionInfo) -> None:
        # What this thread does not catch stands in the log, and nothing counts as received.
        self._outcome = (FAILED, "its thread ended; the log tells why")
        try:
            with self._side.working():
                copy = _map(version.segment) if self._worker == 0 else None
                need_room(self._device, _size(version.tensors), self.spared_bytes)
                staged = StagedTensors(version.tensors, self._device, copy)
                for bucket in self._meet().buckets(version.weight_version, staged.total_bytes):
                    staged.write(bucket)
        except (GroupError, ChecksumError, RuntimeError, OSError) as error:
            self._outcome = _describe(error)
            self._leave()
        else:
            self._staged, self._outcome = staged, ()
        if self._outcome[:1] == (NO_MEMORY,):
            # Behind the error, which holds the tensors that had room.
            self._side.give_back()

    def _meet(self) -> GroupMember:
        if self._group is None:
            raise GroupError("no group was joined")
        if self._member is None:
            self._member = GroupMember(self._group, self._group.rank, self._timeout_s, self._dropped)
        return self._member


def _describe(error: Exception) -> Outcome:
    if isinstance(error, GroupError):
        return (GROUP_BROKE, str(error))
    if isinstance(error, ChecksumError):
        return (OTHER_CHECKSUM, *map(str, error.args))
    if isinstance(error, torch.OutOfMemoryError):
        return (NO_MEMORY, str(error).split("\n", maxsplit=1)[0])
    return (FAILED, f"{type(error).__name__}: {error}")


def _size(tensors: Sequence[ReceivedTensor]) -> int:
    return sum(torch.Size(shape).numel() * DTYPES[dtype].itemsize for _, dtype, shape, _, _ in tensors)


def _map(path: str) -> np.ndarray:
    """The bytes of the service's segment."""
    with Path(path).open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size), np.uint8)
