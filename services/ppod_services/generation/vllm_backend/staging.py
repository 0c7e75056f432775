"""Pushed weights on their way from the service's memory to a worker's device, beside serving. Free of vLLM."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from ppod_models.loading import DTYPES
from ppod_models.page_locks import PageLock
from ppod_services.core.side_stream import SideStream
from ppod_services.generation.vllm_backend.room import need_room
from ppod_services.generation.vllm_backend.segments import read_tensor
from ppod_services.generation.vllm_backend.worker_calls import LOADING_ERRORS

_LOGGER = logging.getLogger(__name__)

TensorAt = tuple[str, str, tuple[int, ...], int]
"""Name, data type, shape and offset of a tensor in a segment."""
Weights = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors, on any device."""


def read_segment(path: str, tensors: Sequence[TensorAt]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a segment, in its own memory; who writes to them writes to copies."""
    with Path(path).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    return _tensors(memory, tensors)


def _tensors(memory: mmap.mmap, tensors: Sequence[TensorAt]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, read_tensor(memory, offset, shape, DTYPES[dtype])) for name, dtype, shape, offset in tensors)


class LockedSegments:
    """Maps segments, and has a device copy from their pages directly: those of the last two versions.

    Which are all, as long as versions are received in turns into the memory of two: then no page is locked anew.

    Args:
        device: what copies; a CPU needs no locks.
    """

    _KEPT = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[tuple[int, int], tuple[mmap.mmap, PageLock | None]] = {}

    def map(self, path: str) -> mmap.mmap:
        """The memory of a segment, not to be written to; it is mapped until two others have been."""
        with Path(path).open("r+b") as file:
            status = os.fstat(file.fileno())
            # Not by its path, which another one may have had. The mapping keeps the number from being given away.
            key = status.st_dev, status.st_ino
            found = self._mapped.pop(key, None)
            if found is None:
                while len(self._mapped) >= self._KEPT:
                    _, lock = self._mapped.pop(next(iter(self._mapped)))
                    if lock is not None:
                        lock.close()
                memory = mmap.mmap(file.fileno(), status.st_size)
                lock = PageLock(memoryview(memory), self._device) if self._device.type == "cuda" else None
                found = memory, lock
            self._mapped[key] = found
        return found[0]


class Waiting(Protocol):
    """Where a version waits on a device; the memory there is kept for the next one."""

    def wanted_bytes(self, tensors: Sequence[TensorAt]) -> int:
        """What a version would take of the device besides what is kept."""
        ...

    def fill(self, weights: Weights) -> None:
        """Take a version. Raises OutOfMemoryError: there is no room; part of it may be there."""
        ...

    def install(self) -> None:
        """Let what was taken serve. Between two steps."""
        ...

    def drop(self) -> None:
        """Free the memory."""
        ...


class Copies:
    """A version as it was pushed.

    Args:
        device: the worker's.
        load: puts one into the model.
    """

    def __init__(self, device: torch.device, load: Callable[[Weights], None]) -> None:
        self._device = device
        self._load = load
        self._tensors: dict[str, torch.Tensor] = {}

    def wanted_bytes(self, tensors: Sequence[TensorAt]) -> int:
        """See `Waiting`."""
        return sum(
            torch.Size(shape).numel() * DTYPES[dtype].itemsize
            for name, dtype, shape, _ in tensors
            if not self._has_place(name, shape, DTYPES[dtype])
        )

    def fill(self, weights: Weights) -> None:
        """See `Waiting`."""
        self._tensors = {name: self._place(name, tensor).copy_(tensor, non_blocking=True) for name, tensor in weights}

    def install(self) -> None:
        """See `Waiting`."""
        self._load(self._tensors.items())

    def drop(self) -> None:
        """See `Waiting`."""
        self._tensors = {}

    def _has_place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
        kept = self._tensors.get(name)
        return kept is not None and (tuple(kept.shape), kept.dtype) == (tuple(shape), dtype)

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._has_place(name, tensor.shape, tensor.dtype):
            return self._tensors[name]
        return torch.empty_like(tensor, device=self._device)


class Stage:
    """Brings one version at a time to where it waits on a device, beside serving.

    Args:
        device: the worker's.
        waiting: where it waits there.
        spared_bytes: what the engine may need of the device's memory besides.
    """

    def __init__(self, device: torch.device, waiting: Waiting, spared_bytes: int = 0) -> None:
        self._device = device
        self._waiting = waiting
        self._spared_bytes = spared_bytes
        self._side = SideStream(device)
        self._segments = LockedSegments(device)
        self._thread: threading.Thread | None = None
        self._version: int | None = None
        self.installed = False
        """Whether a version was let serve from here, or part of it."""

    def begin(self, path: str, tensors: Sequence[TensorAt], weight_version: int) -> None:
        """Bring a segment's weights there while the worker goes on; of a version before them nothing is left."""
        self.begin_with(lambda: _tensors(self._segments.map(path), tensors), tensors, weight_version)

    def begin_with(self, read: Callable[[], Weights], tensors: Sequence[TensorAt], weight_version: int) -> None:
        """As `begin`, weights from anywhere."""
        self._wait()
        self._version = None
        arguments = (read, list(tensors), weight_version)
        self._thread = threading.Thread(target=self._bring, args=arguments, name="weights", daemon=True)
        self._thread.start()

    def holds(self, weight_version: int) -> bool:
        """Whether this version waits there."""
        self._wait()
        return self._version == weight_version

    @property
    def done(self) -> bool:
        """Whether nothing is on its way."""
        return self._thread is None or not self._thread.is_alive()

    def install(self, weight_version: int) -> bool:
        """Let a version serve, once; False: it is not here, and has to be read from its segment."""
        there = self.holds(weight_version)
        self._version = None
        if there:
            self.installed = True
            self._waiting.install()
        return there

    def drop(self) -> None:
        """Free the memory on the device."""
        self._wait()
        self._version = None
        self._waiting.drop()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _bring(self, read: Callable[[], Weights], tensors: Sequence[TensorAt], weight_version: int) -> None:
        failure: str | None = None
        try:
            with self._side.working():
                # Before the segment's pages are locked, which takes a while.
                need_room(self._device, self._waiting.wanted_bytes(tensors), self._spared_bytes)
                self._waiting.fill(read())
        except torch.OutOfMemoryError:
            failure = f"no room on {self._device} for weights that wait"
        except LOADING_ERRORS as error:
            # At the commit it is told to who pushed them, if it is about the weights.
            failure = f"weights could not be brought to {self._device} ({type(error).__name__}: {error})"
        if failure is not None:
            _LOGGER.warning("%s: they are loaded at their commit", failure)
            self._waiting.drop()
            # Behind the error, which holds those that had room.
            self._side.give_back()
            return
        self._version = weight_version
