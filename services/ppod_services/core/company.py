"""Whether an idle service should wait a moment for more requests before it starts a batch. Pure: no clock."""

from __future__ import annotations

_WINDOW_S = 0.5


class Company:
    """Remembers how many requests were open at a time, over the last half to one second.

    Waiting pays only where callers overlap: one that sends a request after the other's answer would wait in vain each
    time. So a lone caller starts at once, and several that work in parallel are waited for until as many requests are
    here as were open together of late.
    """

    def __init__(self) -> None:
        self._window = -1
        self._most = 0
        self._most_before = 0

    def arrived(self, open_requests: int, now_s: float) -> None:
        """A request arrived; `open_requests` counts it and those that are not answered yet."""
        self._turn(now_s)
        self._most = max(self._most, open_requests)

    def expected(self, now_s: float) -> int:
        """How many requests are likely to be open soon, at least 1."""
        self._turn(now_s)
        return max(self._most, self._most_before, 1)

    def _turn(self, now_s: float) -> None:
        window = int(now_s / _WINDOW_S)
        if window != self._window:
            self._most_before = self._most if window == self._window + 1 else 0
            self._most = 0
            self._window = window
