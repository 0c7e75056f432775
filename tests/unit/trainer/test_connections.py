"""Closing what a run is connected to, in time."""

from __future__ import annotations

import threading
import time

import pytest

from ppod_trainer import connections
from ppod_trainer.connections import Connections


class Client:
    """Closes, at once or never."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.closed = threading.Event()
        self._stuck = stuck

    def close(self) -> None:
        if self._stuck:
            threading.Event().wait()
        self.closed.set()


def test_a_channel_that_never_closes_keeps_no_other_and_no_run_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_CLOSE_S", 0.3)
    stuck, others = Client(stuck=True), [Client() for _ in range(4)]
    reference, judge, weights, reference_weights = others
    made = Connections(stuck, None, judge, reference, weights, reference_weights)  # pyright: ignore[reportArgumentType]
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 2
    assert all(client.closed.is_set() for client in others)
    assert not stuck.closed.is_set()


def test_all_are_closed_when_it_returns() -> None:
    clients = [Client() for _ in range(6)]
    Connections(*clients).close()  # pyright: ignore[reportArgumentType]
    assert all(client.closed.is_set() for client in clients)
