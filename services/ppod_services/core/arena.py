"""Memory that one version of the weights is received into on its way to a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ppod_models.loading import DTYPES
from ppod_models.page_locks import page_locked
from ppod_services.core.weight_manifest import IncomingTensor

_ALIGNMENT = 64


class Arena:
    """Page-locked memory of a fixed size, which holds one version at a time, for a CUDA device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        memory, self._lock = page_locked(nbytes, device)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)

    @staticmethod
    def size_of(tensors: Iterable[torch.Tensor]) -> int:
        """What these take in an arena."""
        return sum(_aligned(tensor.nbytes) for tensor in tensors)

    def tensors(self, wanted: Sequence[IncomingTensor]) -> list[torch.Tensor] | None:
        """Tensors of these shapes and data types, in place of all that were given before; None: it is too small."""
        begin = 0
        found: list[torch.Tensor] = []
        for one in wanted:
            end = begin + one.dense_bytes
            if end > self.nbytes:
                return None
            found.append(self._bytes[begin:end].view(DTYPES[one.dtype]).view(one.shape))
            begin += _aligned(one.dense_bytes)
        return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
