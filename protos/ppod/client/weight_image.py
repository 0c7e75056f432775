"""All tensors of one version of the weights in one piece of memory, as they travel. numpy alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash

from ppod.client.weight_calls import TensorDtype, WeightTensor
from ppod.weight_changes import bit_patterns, encode_changes

_THREADS = min(8, os.cpu_count() or 1)
WEIGHT_BLOCK_BYTES = 1024 * 1024
"""Hashed and written at once: small enough to be in the processor's cache the second time."""


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


WriteBlocks = Callable[[int, memoryview], Iterator[memoryview]]
"""Writes the tensor at a layout's position into its memory, block by block, and yields the bytes of each block."""


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
        self._parts: list[memoryview] = []
        # Kept, because new threads need milliseconds until each has a core of its own.
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")
        begin = 0
        for tensor in self.layout:
            self._parts.append(self._memory[begin : begin + tensor.nbytes])
            begin += tensor.nbytes

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
                WeightTensor(tensor.name, tensor.dtype, tensor.shape, part, arriving=future.result)
                for tensor, part, future in zip(self.layout, self._parts, arriving, strict=True)
            ]
        finally:
            wait(arriving)
        for future in arriving:
            future.result()

    def copy_from(self, other: WireImage) -> None:
        """Take the tensors of an image of the same layout."""

        def copy(index: int) -> None:
            np.copyto(np.frombuffer(self._parts[index], np.uint8), np.frombuffer(other._parts[index], np.uint8))
            self._checksums[index] = other._checksums[index]

        self._each(copy)

    def tensors(self) -> list[WeightTensor]:
        """The tensors, whole."""
        return [
            WeightTensor(tensor.name, tensor.dtype, tensor.shape, part, xxh3=checksum)
            for tensor, part, checksum in zip(self.layout, self._parts, self._checksums, strict=True)
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
            checksum.update(block)
        self._checksums[index] = checksum.intdigest()
        return self._checksums[index]

    def _each(self, work: Callable[[int], object]) -> None:
        """Do the work for every tensor, the largest first, so that the threads end together."""
        waiting = iter(sorted(range(len(self.layout)), key=lambda index: -self.layout[index].nbytes))

        def take() -> None:
            # One iterator for all threads: a future for each of hundreds of small tensors would cost more than they do.
            for index in waiting:
                work(index)

        for done in [self._pool.submit(take) for _ in range(_THREADS)]:
            done.result()
