"""The weights that serve, the ones that wait, and a transfer on its way. Knows torch, but no gRPC."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import xxhash

from ppod.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from ppod_models.loading import DTYPES
from ppod_services.core.described import IncomingTensor
from ppod_services.core.weight_store import Install, ReceivedWeights, WeightStore

_BUSY_RETRY_S = 1.0


class WeightTransfer:
    """Receives the bytes of one version into buffers of their final size. One thread at a time may write."""

    def __init__(
        self, weight_version: int, manifest: Sequence[IncomingTensor], buffers: Sequence[torch.Tensor]
    ) -> None:
        self.weight_version = weight_version
        self.received_bytes = 0
        self.started = time.monotonic()
        self._manifest = manifest
        self._buffers = buffers
        self._position = 0
        self._offset = 0

    def write(self, chunk: bytes) -> None:
        """Take the next bytes, and verify each tensor that they complete.

        Raises:
            InvalidArgument: a checksum differs, or there are more bytes than the manifest announced.
        """
        left = memoryview(chunk)
        while left:
            self._skip_empty()
            if self._position == len(self._buffers):
                expected = f"{self.received_bytes} bytes, as the manifest announced"
                raise InvalidArgument("chunk", f"{len(left)} bytes more", expected)
            target = _bytes_of(self._buffers[self._position])
            taken = min(len(left), len(target) - self._offset)
            target[self._offset : self._offset + taken] = left[:taken]
            left = left[taken:]
            self._offset += taken
            self.received_bytes += taken
            if self._offset == len(target):
                self._verify(target)

    def finish(self) -> Mapping[str, torch.Tensor]:
        """All tensors by name; raise InvalidArgument when bytes are missing."""
        self._skip_empty()
        if self._position < len(self._buffers):
            name = self._manifest[self._position].name
            raise InvalidArgument(
                "chunk", f"end of stream after {self.received_bytes} bytes, within {name}", "the bytes of all tensors"
            )
        return {tensor.name: buffer for tensor, buffer in zip(self._manifest, self._buffers, strict=True)}

    def _skip_empty(self) -> None:
        while self._position < len(self._buffers) and not self._buffers[self._position].numel():
            self._position += 1

    def _verify(self, data: memoryview) -> None:
        tensor = self._manifest[self._position]
        found = xxhash.xxh3_64_intdigest(data)
        if found != tensor.xxh3:
            raise InvalidArgument(f"tensors.{tensor.name}.xxh3", f"{found:016x}", f"{tensor.xxh3:016x}")
        self._position += 1
        self._offset = 0


class ServedWeights:
    """Which version serves, which one waits, and one transfer at a time, around the weights of an engine.

    Args:
        store: the engine's weights.
        on_version: told of each version that begins to serve.
    """

    def __init__(self, store: WeightStore, on_version: Callable[[int], None]) -> None:
        self._store = store
        self._on_version = on_version
        self._version = 0
        self._prepared: tuple[int, Install] | None = None
        self._transferring = False
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """The version that serves; constant within a decoding step, because swaps run between two."""
        return self._version

    @property
    def prepared_version(self) -> int | None:
        """The version that waits for its commit."""
        with self._lock:
            return None if self._prepared is None else self._prepared[0]

    def begin(self, weight_version: int, manifest: Sequence[IncomingTensor]) -> WeightTransfer:
        """Check a manifest and open its transfer. Every begin needs its `end`.

        Raises:
            FailedPrecondition: the version is not newer than the serving one. InvalidArgument: a tensor is unknown,
            double, missing or of another shape. ResourceExhausted: another transfer is under way.
        """
        with self._lock:
            self._check_newer(weight_version)
            check_manifest(manifest, self._store.shapes(None))
            if self._transferring:
                # Buffers for two transfers at once might not fit into memory.
                raise ResourceExhausted("another transfer of weights is under way", _BUSY_RETRY_S)
            transfer = WeightTransfer(weight_version, manifest, self._store.allocate(manifest))
            self._transferring = True
        return transfer

    def stage(self, transfer: WeightTransfer) -> Install:
        """Ready a finished transfer for its commit; slow, in a thread. Raises what `WeightTransfer.finish` raises."""
        return self._store.stage(ReceivedWeights(transfer.weight_version, transfer.finish()))

    def end(self, transfer: WeightTransfer, staged: Install | None) -> None:
        """Close a transfer: keep it aside as the prepared one, or with None nothing of it.

        Raises:
            FailedPrecondition: a version came into service meanwhile that this one is not newer than.
        """
        with self._lock:
            self._transferring = False
            if staged is not None:
                self._check_newer(transfer.weight_version)
                self._prepared = (transfer.weight_version, staged)

    def commit(self, weight_version: int) -> float:
        """Put prepared weights into service; must run between two decoding steps. Repeating it changes nothing.

        Returns:
            Seconds that it took.

        Raises:
            FailedPrecondition: the version is neither prepared nor serving.
        """
        start = time.monotonic()
        with self._lock:
            if weight_version == self._version:
                return 0.0
            if self._prepared is None or self._prepared[0] != weight_version:
                found = "none prepared" if self._prepared is None else f"{self._prepared[0]} prepared"
                raise FailedPrecondition("weight_version", f"{self._version} serving, {found}", str(weight_version))
            install = self._prepared[1]
            self._prepared = None
        install()
        self._version = weight_version
        self._on_version(weight_version)
        return time.monotonic() - start

    def _check_newer(self, weight_version: int) -> None:
        if weight_version <= self._version:
            raise FailedPrecondition("weight_version", str(self._version), f"less than {weight_version}")


def check_manifest(manifest: Sequence[IncomingTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InvalidArgument unless a manifest names exactly these tensors, in these shapes."""
    seen: set[str] = set()
    for tensor in manifest:
        shape = shapes.get(tensor.name)
        if shape is None:
            raise InvalidArgument("manifest.tensors.name", tensor.name, "a name of the model's parameters")
        if tensor.name in seen:
            raise InvalidArgument("manifest.tensors.name", f"{tensor.name} twice", "each name once")
        seen.add(tensor.name)
        if tensor.dtype not in DTYPES:
            raise InvalidArgument(f"manifest.tensors.{tensor.name}.dtype", tensor.dtype, " or ".join(DTYPES))
        if tensor.shape != shape:
            raise InvalidArgument(f"manifest.tensors.{tensor.name}.shape", str(list(tensor.shape)), str(list(shape)))
    missing = [name for name in shapes if name not in seen]
    if missing:
        raise InvalidArgument("manifest.tensors", f"{len(missing)} missing, first {missing[0]}", f"all {len(shapes)}")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A writable view of a contiguous CPU tensor's bytes."""
    if math.prod(tensor.shape) == 0:
        return memoryview(b"")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
