"""Locks of pages, with a stand-in for the CUDA runtime: what it is asked, where, and what a refusal leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch

from ppod_models import page_locks
from ppod_models.page_locks import page_locked

DEVICE = torch.device("cuda:1")


class Runtime:
    """As the CUDA runtime a thread at a time: it has a current device, and keeps its last error."""

    def __init__(self, result: int) -> None:
        self.result = result
        self.threads = threading.local()
        self.registered: list[tuple[int, torch.device | None]] = []
        self.unregistered = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        del address, flags
        self.registered.append((nbytes, getattr(self.threads, "device", None)))
        self.threads.error = self.result
        return self.result

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del address
        self.unregistered += 1
        return 0

    @contextmanager
    def on(self, device: torch.device) -> Generator[None]:
        self.threads.device = device
        yield
        del self.threads.device


@pytest.mark.parametrize(("result", "locked"), [(0, True), (2, False), (801, False)])
def test_memory_is_locked_for_its_device_and_a_refusal_is_no_later_kernels_error(
    monkeypatch: pytest.MonkeyPatch, result: int, locked: bool
) -> None:
    runtime = Runtime(result)
    monkeypatch.setattr(page_locks, "_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", runtime.on)
    memory, lock = page_locked(100, DEVICE)
    assert (len(memory), lock.locked) == (100, locked)
    assert runtime.registered == [(100, DEVICE)]
    # torch asks for the thread's last error behind each kernel, and would raise it there.
    assert not hasattr(runtime.threads, "error")
    lock.close()
    lock.close()
    assert (lock.locked, runtime.unregistered) == (False, int(locked))
