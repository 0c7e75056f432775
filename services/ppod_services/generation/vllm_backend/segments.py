"""Memory that the engine's worker processes map: pushed weights reach them without a copy through a socket."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

_ALIGNMENT = 64
_NAMED = re.compile(r" (/dev/shm/\S+-cpushm_\d+)$", re.MULTILINE)
"""How a process's list of its mappings names what vLLM's CPU workers share."""


class Segment:
    """Anonymous shared memory for tensors, one after the other.

    It is a memfd and no file under /dev/shm, which containers limit to 64 MiB by default; it is gone when nobody maps
    it any more, also after a crash. Worker processes open it by `path`, as long as this object lives.

    Args:
        shapes, dtypes: of the tensors that it is to hold.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> None:
        self._layout = (list(map(tuple, shapes)), list(dtypes))
        self.offsets: list[int] = []
        end = 0
        for shape, dtype in zip(shapes, dtypes, strict=True):
            self.offsets.append(end)
            size = torch.Size(shape).numel() * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._fd = os.memfd_create("ppod-weights", os.MFD_CLOEXEC)
        # A mapping of nothing is an error.
        os.ftruncate(self._fd, max(end, _ALIGNMENT))
        memory = mmap.mmap(self._fd, max(end, _ALIGNMENT))
        self.tensors = [
            read_tensor(memory, offset, shape, dtype)
            for offset, shape, dtype in zip(self.offsets, shapes, dtypes, strict=True)
        ]

    def __del__(self) -> None:
        # The mapping goes with the last tensor that looks into it.
        os.close(self._fd)

    def holds(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> bool:
        """Whether it was made for tensors like these."""
        return self._layout == (list(map(tuple, shapes)), list(dtypes))

    @property
    def path(self) -> str:
        """Where another process of this user finds the memory."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"


def read_tensor(memory: mmap.mmap, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that looks into mapped memory, and keeps it mapped."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(tuple(shape))


def unname_shared_memory() -> None:
    """Take the names from the memory in which vLLM's CPU workers add up, so that it goes when they do.

    vLLM leaves it in /dev/shm, 4 MiB for each worker and thread, also where it ends cleanly. All of its workers must
    have mapped it.
    """
    for path in set(_NAMED.findall(Path("/proc/self/maps").read_text(encoding="utf-8"))):
        Path(path).unlink(missing_ok=True)
