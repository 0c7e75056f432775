"""Host memory that CUDA devices copy to and from directly, several times as fast as by the driver's own buffers."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, cast

import torch


class _Runtime(Protocol):
    """What is used of the CUDA runtime; the results are error codes."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int: ...  # noqa: N802
    def cudaHostUnregister(self, address: int) -> int: ...  # noqa: N802


def page_locked(nbytes: int, device: torch.device) -> tuple[memoryview, PageLock]:
    """New memory, locked for a CUDA device; it stays so for as long as the lock lives."""
    memory = memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]
    return memory, PageLock(memory, device)


class PageLock:
    """Keeps the pages of writable memory in place, which are touched by that, and holds the memory.

    Where the system refuses, the memory is as good as it was; `locked` tells.

    Args:
        memory: of this process, or a shared mapping of a file. No private one: its pages would be copied.
        device: the CUDA device that copies.
    """

    def __init__(self, memory: memoryview, device: torch.device) -> None:
        self._memory = memory
        self._address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr() if len(memory) else 0
        self.locked = False
        if self._address:
            # CUDA keeps a refusal's error for the thread that was refused: torch would find it there behind the next
            # kernel, and raise it as that one's.
            with ThreadPoolExecutor(1) as thread:
                self.locked = thread.submit(_register, self._address, len(memory), device).result()

    def close(self) -> None:
        """Let go of the pages; whoever copies must have ended."""
        if self.locked:
            self.locked = False
            _runtime().cudaHostUnregister(self._address)

    def __del__(self) -> None:
        # At the end of the interpreter CUDA may be gone, and the lock with it.
        if self.locked and torch.cuda is not None:
            self.close()


def _register(address: int, nbytes: int, device: torch.device) -> bool:
    """Whether the pages could be locked. Not on the thread's own device, which would get a context for it."""
    with torch.cuda.device(device):
        return int(_runtime().cudaHostRegister(address, nbytes, 0)) == 0


def _runtime() -> _Runtime:
    return cast(_Runtime, torch.cuda.cudart())
