"""A request's way through the scheduler: what is submitted, what comes back, and the ticket that stands for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ppod.errors import Cancelled, PpodError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Submission(Generic[ItemT]):
    """One sequence to run.

    Attributes:
        item: what the engine takes.
        tokens: its cost.
        group: only equal ones share a batch.
        packed: whether the engine runs this group's sequences one after the other, without padding.
    """

    item: ItemT
    tokens: int
    group: Hashable = None
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Outcome(Generic[ResultT]):
    """The result of one sequence.

    Attributes:
        index: position in the request.
        batch: number of the batch that held it.
        queue_s: seconds from submission to the start of that batch.
        compute_s: seconds from the start of that batch to this result.
    """

    index: int
    result: ResultT
    batch: int
    queue_s: float
    compute_s: float


class Ticket(Generic[ResultT]):
    """A request in the scheduler. Await its results with `gather`, or take each as it comes with `stream`.

    Attributes:
        arrived_s: when it was submitted, on the monotonic clock.
        expires_s: when its results are worth nothing any more.
        begun: whether a batch held a part of it.
        closed: whether nobody waits for its results any more; other threads may read it.
    """

    def __init__(
        self, count: int, arrived_s: float, expires_s: float, on_close: Callable[[Ticket[ResultT], str], None]
    ) -> None:
        self.arrived_s = arrived_s
        self.expires_s = expires_s
        self.begun = False
        self.closed = False
        self._count = count
        self._left = count
        self._outcomes: deque[Outcome[ResultT]] = deque()
        self._error: PpodError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wakes_at_end = False
        self._on_close = on_close

    async def stream(self) -> AsyncIterator[Outcome[ResultT]]:
        """Yield each outcome as it comes; raise the error of the first entry that failed."""
        for _ in range(self._count):
            while not self._outcomes:
                await self._news()
            yield self._outcomes.popleft()

    async def gather(self) -> list[Outcome[ResultT]]:
        """All outcomes in the request's order."""
        self._wakes_at_end = True
        while self._left:
            await self._news()
        return sorted(self._outcomes, key=_index)

    def deliver(self, outcome: Outcome[ResultT]) -> None:
        """Hand over one outcome."""
        if self.closed:
            return
        self._outcomes.append(outcome)
        self._left -= 1
        if not self._left:
            self._close("done")
        elif not self._wakes_at_end:
            self._wake()

    def fail(self, error: PpodError, reason: str = "failed") -> None:
        """End the request with an error; entries that still wait leave the queue."""
        if not self.closed:
            self._error = error
            self._close(reason)

    def cancel(self) -> None:
        """The caller is gone. Harmless after the last outcome."""
        self.fail(Cancelled("the caller went away"), "cancelled")

    async def _news(self) -> None:
        """Return when something was delivered; raise the request's error."""
        if self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    def _close(self, reason: str) -> None:
        self.closed = True
        self._on_close(self, reason)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _index(outcome: Outcome[ResultT]) -> int:
    return outcome.index
