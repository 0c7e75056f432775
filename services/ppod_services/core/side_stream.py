"""Work on a device beside what computes there."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


class SideStream:
    """Copies that do not stand in line with decoding steps. On the CPU there is nothing to stand in line for.

    One stream for all of them: memory that was freed on one stream is not used again on another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def working(self) -> Generator[None]:
        """What the calling thread begins within the context is done at its end; one thread at a time."""
        if self._device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # What is written to may have been read until a moment ago.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def give_back(self) -> None:
        """Let go of memory that was freed here: torch would keep it for this stream, and from other processes."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
