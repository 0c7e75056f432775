"""Who may push weights when: to all replicas by oneself, to single newcomers beside each other."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager


class PushTurns:
    """A push to all waits for newcomers that are being brought up, and goes before those that wait themselves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newcomers = 0
        self._pushing = False
        self._waiting = 0

    @contextmanager
    def push(self) -> Generator[None]:
        """To all; nobody else pushes."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._pushing and not self._newcomers)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._pushing = True
        try:
            yield
        finally:
            with self._changed:
                self._pushing = False
                self._changed.notify_all()

    @contextmanager
    def newcomer(self) -> Generator[None]:
        """To one; others may do the same."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pushing and not self._waiting)
            self._newcomers += 1
        try:
            yield
        finally:
            with self._changed:
                self._newcomers -= 1
                self._changed.notify_all()
