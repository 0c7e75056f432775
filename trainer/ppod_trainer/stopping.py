"""SIGINT and SIGTERM: stop soon, but only where the run is whole."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from ppod_models.ending import ECHO_S
from ppod_trainer.errors import StopRequestedError


class StopSignal:
    """Turns the first SIGINT or SIGTERM into StopRequestedError at a safe place; a second one ends at once.

    Inside `interruptible` (calls to services, which change nothing here) the error is raised at once; elsewhere, in the
    middle of an update say, `check` raises it afterwards.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._came_here_s: float | None = None
        self._interruptible = False

    def install(self) -> None:
        """Take over the two signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def hear(self, number: int) -> None:
        """Another rank got this signal; 0: none of them did."""
        if number and self.received is None:
            self.received = number

    def check(self) -> None:
        """Raise StopRequestedError if a signal came in."""
        if self.received is not None:
            raise StopRequestedError(signal.Signals(self.received).name)

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Let a signal break off the block."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
        self.check()

    @contextmanager
    def deferred(self) -> Generator[None]:
        """Keep a signal from breaking off the block, which is inside `interruptible`; it does so afterwards."""
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        if before:
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self._came_here_s is not None:
            if now - self._came_here_s < ECHO_S:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # One that another rank got does not make this the second: whoever ends a run asks all of its ranks.
        self._came_here_s = now
        self.received = number
        if self._interruptible:
            self._interruptible = False
            self.check()


class NotedSignal:
    """SIGINT and SIGTERM to a rank that follows another: noted for that one, which ends the run where it is whole."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Take over the two signals, however often they come: rank 0 needs this one for its checkpoint."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
