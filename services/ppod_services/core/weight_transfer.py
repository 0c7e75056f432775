"""One version of the weights on its way in: bytes become tensors, each verified once it is whole. Free of gRPC."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xxhash

from ppod.errors import FailedPrecondition, InvalidArgument
from ppod.weight_changes import Bytes, TensorEncoding, apply_changes, bit_patterns
from ppod_services.core.weight_manifest import ITEM_BYTES, IncomingManifest, IncomingTensor
from ppod_services.core.weight_store import Buffer, Hold

ReadImage = Callable[[str, str], "torch.Tensor | None"]
"""See `WeightStore.image`."""


class TensorReceiver:
    """Receives one tensor into a buffer of its final size. One thread at a time may use it.

    Hashing and copying of large blocks let go of the interpreter, so several receivers can work side by side.
    """

    def __init__(self, tensor: IncomingTensor, buffer: Buffer, image: ReadImage) -> None:
        self.tensor = tensor
        self.buffer = buffer
        self._image = image
        self._dense = tensor.encoding is TensorEncoding.DENSE
        self._into = buffer.data if self._dense else np.empty(tensor.encoded_bytes, np.uint8)
        self._hash = xxhash.xxh3_64()
        self._filled = 0
        self.checksum = 0
        self.done = False

    @property
    def room(self) -> Bytes:
        """Where the next bytes go."""
        return self._into[self._filled :]

    def take(self, data: Bytes) -> None:
        """Copy the next bytes to where they go; raises what `advance` raises."""
        if self._dense:
            # Where they lie, in the cache: a large copy may go past it.
            self._hash.update(data.data)
        np.copyto(self.room[: len(data)], data)
        self._advance(len(data))

    def advance(self, count: int) -> None:
        """The next `count` bytes are there; the last ones complete the tensor.

        Raises:
            InvalidArgument: the checksum of the manifest differs, or the changes are damaged.
            FailedPrecondition: there is nothing to apply changes to.
        """
        if self._dense:
            # While the block is still in the cache.
            self._hash.update(self.room[:count].data)
        self._advance(count)

    def verify_in_place(self) -> None:
        """The bytes of the whole tensor, which is dense, are there; raises InvalidArgument as `advance` does."""
        self._complete(xxhash.xxh3_64_intdigest(self._into.data))

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._into):
            if not self._dense:
                self._apply()
                self._hash.update(self.buffer.data.data)
            self._complete(self._hash.intdigest())

    def _complete(self, checksum: int) -> None:
        self.checksum = checksum
        if self.tensor.xxh3 is not None:
            self.verify(self.tensor.xxh3)
        self.done = True

    def verify(self, xxh3: int) -> None:
        """Raise InvalidArgument unless this is the checksum of the tensor, which must be complete."""
        if self.checksum != xxh3:
            raise InvalidArgument(f"tensors.{self.tensor.name}.xxh3", f"{self.checksum:016x}", f"{xxh3:016x}")

    def _apply(self) -> None:
        tensor = self.tensor
        base = self._image(tensor.name, tensor.dtype)
        if base is None:
            raise FailedPrecondition("base_version", f"no exact {tensor.dtype} image of its weights", "whole tensors")
        self.buffer.tensor.copy_(base)
        target = bit_patterns(self.buffer.data, ITEM_BYTES[tensor.dtype])
        apply_changes(tensor.encoding, self._into, target, f"tensors.{tensor.name}")


class WeightTransfer:
    """Receives all tensors of one manifest.

    Args:
        manifest: what must come.
        buffers: of the manifest's shapes and data types, in its order.
        image: the base's tensors, which changes are applied to.
        hold: of the shared file whose memory the buffers are; None: they are the engine's own.
    """

    def __init__(
        self,
        manifest: IncomingManifest,
        buffers: Sequence[Buffer],
        image: ReadImage,
        hold: Hold | None = None,
    ) -> None:
        self.manifest = manifest
        self.hold = hold
        self.received_bytes = 0
        self.receivers = [
            TensorReceiver(tensor, buffer, image) for tensor, buffer in zip(manifest.tensors, buffers, strict=True)
        ]
        self._position = 0
        self._owed = any(tensor.xxh3 is None for tensor in manifest.tensors)

    @property
    def borrowed(self) -> bool:
        """Whether the buffers are a shared file's memory."""
        return self.hold is not None

    @property
    def checksums(self) -> list[int]:
        """XXH3-64 of each tensor as it was found; raise InvalidArgument when bytes or the sender's own are missing."""
        self._check_verified()
        return [receiver.checksum for receiver in self.receivers]

    @property
    def weight_version(self) -> int:
        """What these weights will be."""
        return self.manifest.weight_version

    def write(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes of a stream, and verify each tensor that they complete.

        Raises:
            InvalidArgument: a checksum differs, or there are more bytes than the manifest announced.
        """
        left = np.frombuffer(chunk, np.uint8)
        while len(left):
            receiver = self._next()
            if receiver is None:
                expected = f"{self.received_bytes} bytes, as the manifest announced"
                raise InvalidArgument("chunk", f"{len(left)} bytes more", expected)
            taken = min(len(left), len(receiver.room))
            receiver.take(left[:taken])
            left = left[taken:]
            self.received_bytes += taken

    def verify_in_place(self) -> None:
        """Verify all tensors; their bytes are in the buffers already. Raises InvalidArgument: a checksum differs."""
        for receiver in self.receivers:
            receiver.verify_in_place()
        self.received_bytes = self.manifest.wire_bytes

    def verify(self, checksums: Sequence[int]) -> None:
        """Verify all tensors by checksums that came behind them.

        Raises:
            InvalidArgument: one differs, there are more or fewer, bytes are missing, or the manifest announced none.
        """
        self._check_whole()
        expected = len(self.receivers) if self._owed else 0
        if len(checksums) != expected:
            raise InvalidArgument("checksums", str(len(checksums)), f"{expected}, as the manifest announced")
        for receiver, checksum in zip(self.receivers, checksums, strict=True):
            receiver.verify(checksum)
        self._owed = False

    def finish(self) -> Mapping[str, torch.Tensor]:
        """All tensors by name; raise InvalidArgument when bytes or checksums are missing."""
        self._check_verified()
        return {receiver.tensor.name: receiver.buffer.tensor for receiver in self.receivers}

    def _check_verified(self) -> None:
        self._check_whole()
        if self._owed:
            raise InvalidArgument("checksums", "end of stream", f"{len(self.receivers)}, as the manifest announced")

    def _check_whole(self) -> None:
        receiver = self._next()
        if receiver is not None:
            found = f"end of the chunks after {self.received_bytes} bytes, within {receiver.tensor.name}"
            raise InvalidArgument("chunk", found, "the bytes of all tensors")

    def _next(self) -> TensorReceiver | None:
        """The receiver of the next byte; those that need none are completed."""
        while self._position < len(self.receivers):
            receiver = self.receivers[self._position]
            if not receiver.done and not len(receiver.room):
                receiver.advance(0)
            if not receiver.done:
                return receiver
            self._position += 1
        return None


def buffers_of(tensors: Sequence[torch.Tensor]) -> list[Buffer]:
    """Contiguous CPU tensors and their bytes."""
    return [Buffer(tensor, bytes_of(tensor)) for tensor in tensors]


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """A writable view of a contiguous CPU tensor's bytes."""
    if math.prod(tensor.shape) == 0:
        return np.empty(0, np.uint8)
    return tensor.view(-1).view(torch.uint8).numpy()
