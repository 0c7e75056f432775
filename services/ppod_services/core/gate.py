"""Counts calls under way: refuses new ones where there are too many, or the server is on its way out."""

from __future__ import annotations

import asyncio

from ppod.errors import ResourceExhausted, Unavailable

_KEPT = 0.9
_FIRST_RETRY_S = 0.1


class CallGate:
    """Counts calls under way, and refuses new ones once closed or full.

    Args:
        max_calls: most calls under way. Each holds its message and its reply in memory.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls = 0
        self._call_s = _FIRST_RETRY_S
        self._refusal: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._calls

    def close(self, refusal: str) -> None:
        """Refuse calls from now on, with this message."""
        self._refusal = refusal

    async def wait_idle(self) -> None:
        """Return when no call is under way."""
        await self._idle.wait()

    def check(self) -> None:
        """Raise Unavailable when closed, ResourceExhausted when full.

        It is full until one of the calls ends; after the mean time of a call all of them have, by Little's law, so
        that is when a caller can count on a place.
        """
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if self._calls >= self._max_calls:
            raise ResourceExhausted(f"{self._calls} calls are under way, the most that this server takes", self._call_s)

    def enter(self) -> None:
        """Count a call, or raise as `check` does. Every enter that returns needs its `leave`."""
        self.check()
        self._calls += 1
        self._idle.clear()

    def leave(self, seconds: float) -> None:
        """The call ended, after so many seconds."""
        self._call_s = _KEPT * self._call_s + (1 - _KEPT) * seconds
        self._calls -= 1
        if not self._calls:
            self._idle.set()
