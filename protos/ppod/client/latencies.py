"""What a client remembers of recent calls: latencies by size, and how many hedges it may still send."""

from __future__ import annotations

import threading
from collections import deque

_REMEMBERED = 200
_LEAST = 20


class Latencies:
    """Recent latencies of successful calls, by the binary order of magnitude of their tokens. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_size: dict[int, deque[float]] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """Remember a call."""
        with self._lock:
            self._by_size.setdefault(tokens.bit_length(), deque(maxlen=_REMEMBERED)).append(seconds)

    def p95_s(self, tokens: int) -> float | None:
        """The 95th percentile for calls of about this size; None until 20 are known."""
        with self._lock:
            known = sorted(self._by_size.get(tokens.bit_length(), ()))
        return known[int(0.95 * (len(known) - 1))] if len(known) >= _LEAST else None


class HedgeBudget:
    """Lets through at most `fraction` hedges for each request sent. Thread-safe.

    Unused allowance is kept up to ten hedges, so that a quiet hour does not pay for a storm.
    """

    def __init__(self, fraction: float) -> None:
        self._lock = threading.Lock()
        self._fraction = fraction
        self._allowance = 0.0

    def earn(self) -> None:
        """A request was sent."""
        with self._lock:
            self._allowance = min(10.0, self._allowance + self._fraction)

    def take(self) -> bool:
        """Whether a hedge may be sent; counts it."""
        with self._lock:
            # A sum of 20 times 0.05 is a little less than 1.
            if self._allowance < 1.0 - 1e-9:
                return False
            self._allowance -= 1.0
            return True
