"""How fast the model works, measured where it is busy. Pure: no clock."""

from __future__ import annotations

_KEPT = 0.9


class ComputeRate:
    """Tokens a second of full batches, padding left out, over about the last ten of them.

    A batch that leaves the queue empty may be small, and small batches are slower by the token: they tell how fast the
    model is at least, never that it is slow.
    """

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._running_tokens = 0
        self._started_s = 0.0

    def started(self, tokens: int, now_s: float) -> None:
        """A batch begins."""
        self._running_tokens = tokens
        self._started_s = now_s

    def finished(self, tokens: int, seconds: float, *, saturated: bool) -> None:
        """A batch ended; `saturated`: others waited for its end."""
        self._running_tokens = 0
        if saturated:
            self._tokens = _KEPT * self._tokens + tokens
            self._seconds = _KEPT * self._seconds + seconds
            self.tokens_per_s = self._tokens / max(self._seconds, 1e-9)
        else:
            self.tokens_per_s = max(self.tokens_per_s, tokens / max(seconds, 1e-9))

    def failed(self) -> None:
        """A batch broke, which says nothing about speed."""
        self._running_tokens = 0

    def seconds(self, tokens: float) -> float:
        """How long this many tokens take, by estimate; zero while nothing is known."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0

    def running_s(self, now_s: float) -> float:
        """Seconds until the running batch ends, by estimate; zero when none runs."""
        if not self._running_tokens or not self.tokens_per_s:
            return 0.0
        return max(0.0, self._running_tokens / self.tokens_per_s - (now_s - self._started_s))
