"""All tensors of one version of the weights in one piece of memory, as they travel. numpy alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash

from ppod.client.weight_calls import TensorDtype, WeightTensor
from ppod.weight_changes import Bytes, bit_patterns, encode_changes

_THREADS = min(8, os.cpu_count() or 1)
WEIGHT_BLOCK_BYTES = 512 * 1024
"""Written and hashed at once: a block and its copy fit into a core's cache of 1 MiB, so that neither is read twice."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """What one tensor of an image is."""

    name: str
    dtype: TensorDtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


WriteBlocks = Callable[[int, Bytes], Iterator[Bytes]]
"""Writes the tensor at a layout's position into its memory, block by block, and yields the bytes of each block.

Several threads do so at once: what takes the interpreter costs all of them.
"""


class WireImage:
    """The tensors of one version, row-major and little-endian, one after the other without gaps.

    Args:
        layout: the tensors, in their order.
        memory: writable, of the size of all tensors; None: memory of its own.
    """

    def __init__(self, layout: Sequence[TensorLayout], memory: memoryview | None = None) -> None:
        self.layout = tuple(layout)
        self.nbytes = sum(tensor.nbytes for tensor in self.layout)
        self._memory = np.empty(self.nbytes, np.uint8).data if memory is None else memory
        self._checksums = [0] * len(self.layout)
        self._parts: list[Bytes] = []
        # Kept, because new threads need milliseconds until each has a core of its own.
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")
        data, begin = np.frombuffer(self._memory, np.uint8), 0
        for tensor in self.layout:
            self._parts.append(data[begin : begin + tensor.nbytes])
            begin += tensor.nbytes
        self._views = [part.data for part in self._parts]
        # The largest first, so that the threads end together.
        self._order = sorted(range(len(self._parts)), key=lambda index: -len(self._parts[index]))

    def fill(self, write: WriteBlocks) -> None:
        """Have every tensor written, several at once, and take its checksum while it is in the cache."""
        self._each(lambda index: self._fill(index, write))

    @contextmanager
    def filling(self, write: WriteBlocks) -> Generator[list[WeightTensor]]:
        """Have the tensors written in their order, and push each as soon as it is there.

        The context's end waits until all are written, and raises what went wrong there.
        """
        arriving = [self._pool.submit(self._fill, index, write) for index in range(len(self.layout))]
        try:
            yield [
                WeightTensor(tensor.name, tensor.dtype, tensor.shape, view, arriving=future.result)
                for tensor, view, future in zip(self.layout, self._views, arriving, strict=True)
            ]
        finally:
            wait(arriving)
        for future in arriving:
            future.result()

    def copy_from(self, other: WireImage) -> None:
        """Take the tensors of an image of the same layout."""

        def copy(index: int) -> None:
            np.copyto(self._parts[index], other._parts[index])
            self._checksums[index] = other._checksums[index]

        self._each(copy)

    def tensors(self) -> list[WeightTensor]:
        """The tensors, whole."""
        return [
            WeightTensor(tensor.name, tensor.dtype, tensor.shape, view, xxh3=checksum)
            for tensor, view, checksum in zip(self.layout, self._views, self._checksums, strict=True)
        ]

    def changes(self, base: WireImage) -> list[WeightTensor]:
        """The tensors as changes against an image of the same layout, each in its smallest encoding."""
        encoded: list[WeightTensor | None] = [None] * len(self.layout)

        def encode(index: int) -> None:
            tensor = self.layout[index]
            new, old = (bit_patterns(image._parts[index], tensor.dtype.itemsize) for image in (self, base))
            encoding, data = encode_changes(new, old)
            encoded[index] = WeightTensor(
                tensor.name, tensor.dtype, tensor.shape, data.data, encoding, self._checksums[index]
            )

        self._each(encode)
        return [tensor for tensor in encoded if tensor is not None]

    def _fill(self, index: int, write: WriteBlocks) -> int:
        checksum = xxhash.xxh3_64()
        for block in write(index, self._parts[index]):
            checksum.update(block.data)
        self._checksums[index] = checksum.intdigest()
        return self._checksums[index]

    def _each(self, work: Callable[[int], object]) -> None:
        """Do the work for every tensor, the largest first."""
        work_side_by_side(work, self._order, self._pool, _THREADS)


def work_side_by_side(
    work: Callable[[int], object], order: Iterable[int], pool: ThreadPoolExecutor, threads: int
) -> None:
    """Do the work for each index, in this order, in this thread and others of the pool; all have ended when it returns.

    Args:
        work: raises what this raises.
        order: of the indices.
        pool: with as many threads.
        threads: how many work, this one among them.
    """
    waiting = iter(order)

    def take() -> None:
        # One iterator for all threads: a future for each of hundreds of small tensors would cost more than they do.
        for index in waiting:
            work(index)

    others = [pool.submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        wait(others)
    for other in others:
        other.result()
