"""How much work waits for something that is no model: bounded, with a truthful wait for those who must come back."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from ppod.errors import InvalidArgument, ResourceExhausted

_DECAY = 0.8
_FIRST_GUESS_S = 1.0
_LONGEST_RETRY_S = 60.0


class Backlog:
    """Counts texts that wait or run, and measures how fast they go.

    Args:
        what: whose backlog it is, for errors.
        most: most texts at a time.
    """

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._waiting = 0
        self._texts_per_s = 0.0

    @contextmanager
    def hold(self, texts: int) -> Generator[None]:
        """Count texts while the block runs.

        Raises:
            InvalidArgument: they alone are too many. ResourceExhausted: they are too many now.
        """
        if texts > self._most:
            raise InvalidArgument("request", f"{texts} texts for {self._what}", f"at most {self._most}")
        if self._waiting + texts > self._most:
            retry_s = self._waiting / self._texts_per_s if self._texts_per_s else _FIRST_GUESS_S
            raise ResourceExhausted(
                f"{self._what}: {self._waiting} of {self._most} texts wait", min(max(retry_s, 0.01), _LONGEST_RETRY_S)
            )
        waiting_then = self._waiting + texts
        self._waiting += texts
        start = time.monotonic()
        try:
            yield
        finally:
            self._waiting -= texts
        rate = waiting_then / max(time.monotonic() - start, 1e-6)
        self._texts_per_s = rate if not self._texts_per_s else _DECAY * self._texts_per_s + (1 - _DECAY) * rate
