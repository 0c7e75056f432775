"""A client that scores without a pause, and what became of each call."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ppod import PpodError, RewardClient


@dataclass
class Load:
    """What was done so far."""

    calls: int = 0
    longest_s: float = 0.0
    errors: list[PpodError] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@contextmanager
def scoring(target: str, *, threads: int = 4, timeout_s: float = 60.0) -> Iterator[Load]:
    """Score on several threads until the context ends."""
    load, stop, lock = Load(), threading.Event(), threading.Lock()

    def score() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            try:
                value = float(client.score_texts(["A joy from start to end."]).values[0])
            except PpodError as error:
                with lock:
                    load.errors.append(error)
                continue
            with lock:
                load.calls += 1
                load.values.append(value)
                load.longest_s = max(load.longest_s, time.monotonic() - begun)

    with RewardClient(target, timeout_s=timeout_s) as client:
        running = [threading.Thread(target=score) for _ in range(threads)]
        for each in running:
            each.start()
        try:
            yield load
        finally:
            stop.set()
            for each in running:
                each.join(timeout_s)
