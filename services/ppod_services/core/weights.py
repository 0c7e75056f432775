"""The weights that serve, the ones that wait, and a transfer on its way. Knows torch, but no gRPC."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import xxhash
from torch import nn

from ppod.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from ppod_models.loading import DTYPES
from ppod_services.core.described import IncomingTensor

_BUSY_RETRY_S = 1.0


class WeightTransfer:
    """Receives the bytes of one version into buffers of their final size. One thread at a time may write."""

    def __init__(self, weight_version: int, manifest: Sequence[IncomingTensor]) -> None:
        self.weight_version = weight_version
        self.received_bytes = 0
        self.started = time.monotonic()
        self._manifest = manifest
        self._buffers = [torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]) for tensor in manifest]
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
    """The weights of a model in service.

    Names are those of `model.named_parameters()`: a tied parameter has one name, that of its first owner.

    Args:
        model: its parameters are overwritten in place, so their storage and dtype stay.
        on_version: told of each version that begins to serve.
    """

    def __init__(self, model: nn.Module, on_version: Callable[[int], None]) -> None:
        self._parameters = dict(model.named_parameters())
        self._on_version = on_version
        self._version = 0
        self._prepared: tuple[int, Mapping[str, torch.Tensor]] | None = None
        self._transferring = False
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """The version that serves; constant within a batch, because swaps run between two."""
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
            if weight_version <= self._version:
                raise FailedPrecondition("weight_version", str(self._version), f"less than {weight_version}")
            self._check_manifest(manifest)
            if self._transferring:
                # Buffers for two transfers at once might not fit into memory.
                raise ResourceExhausted("another transfer of weights is under way", _BUSY_RETRY_S)
            transfer = WeightTransfer(weight_version, manifest)
            self._transferring = True
        return transfer

    def end(self, transfer: WeightTransfer, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Close a transfer: keep its tensors aside, or with None nothing of it."""
        with self._lock:
            self._transferring = False
            if tensors is not None:
                self._prepared = (transfer.weight_version, tensors)

    def commit(self, weight_version: int) -> float:
        """Put prepared weights into service; must run in the model's thread. Repeating it changes nothing.

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
            tensors = self._prepared[1]
            self._prepared = None
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
        self._version = weight_version
        self._on_version(weight_version)
        return time.monotonic() - start

    def _check_manifest(self, manifest: Sequence[IncomingTensor]) -> None:
        seen: set[str] = set()
        for tensor in manifest:
            parameter = self._parameters.get(tensor.name)
            if parameter is None:
                raise InvalidArgument("manifest.tensors.name", tensor.name, "a name of the model's parameters")
            if tensor.name in seen:
                raise InvalidArgument("manifest.tensors.name", f"{tensor.name} twice", "each name once")
            seen.add(tensor.name)
            if tensor.dtype not in DTYPES:
                raise InvalidArgument(f"manifest.tensors.{tensor.name}.dtype", tensor.dtype, " or ".join(DTYPES))
            if tensor.shape != tuple(parameter.shape):
                raise InvalidArgument(
                    f"manifest.tensors.{tensor.name}.shape", str(list(tensor.shape)), str(list(parameter.shape))
                )
        missing = [name for name in self._parameters if name not in seen]
        if missing:
            raise InvalidArgument(
                "manifest.tensors", f"{len(missing)} missing, first {missing[0]}", f"all {len(self._parameters)}"
            )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A writable view of a contiguous CPU tensor's bytes."""
    if math.prod(tensor.shape) == 0:
        return memoryview(b"")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
