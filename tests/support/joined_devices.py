"""On which CUDA device a thread meets a group, where there is none. Each thread's own would be the first one."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from ppod_models.process_groups import GroupError


def note_joins(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[str | None]:
    """Let nobody come to what `module` meets by `name`; each one's device, None where it set none."""
    threads = threading.local()
    found: list[str | None] = []

    @contextmanager
    def on(device: torch.device) -> Generator[None]:
        threads.device = str(device)
        try:
            yield
        finally:
            del threads.device

    def join(*_: object) -> None:
        found.append(getattr(threads, "device", None))
        raise GroupError("nobody came")

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(module, name, join)
    return found
