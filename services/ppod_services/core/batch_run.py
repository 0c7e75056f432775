"""One batch on its way through the model's thread, and its results on their way to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ppod.errors import PpodError
from ppod_services.core.tickets import Outcome, Ticket

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
ResultT_contra = TypeVar("ResultT_contra", contravariant=True)


class Sink(Protocol[ResultT_contra]):
    """Where an engine puts the results of a batch, by position in the batch."""

    def emit(self, position: int, result: ResultT_contra) -> None:
        """Deliver a result; its caller hears of it while the batch goes on."""
        ...

    def fail(self, position: int, error: PpodError) -> None:
        """Fail the request of an entry, and leave the rest of the batch unharmed."""
        ...

    def abandoned(self, position: int) -> bool:
        """Whether nobody waits for this entry any more, so that the engine may drop it."""
        ...


RunBatch = Callable[[Sequence[ItemT], Sink[ResultT]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Entry(Generic[ItemT, ResultT]):
    """One sequence in the queue."""

    ticket: Ticket[ResultT]
    team: str
    index: int
    item: ItemT
    tokens: int
    group: Hashable
    packed: bool


class Mailbox:
    """Runs calls in the event loop on behalf of the model's thread, in their order.

    Calls that come in quick succession share one wake-up of the loop: a wake-up writes to a pipe, and with one for
    each sequence of a large batch the model's thread would wait for the loop more than it computes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._awake = False

    def post(self, call: Callable[[], None]) -> None:
        """Have this called soon."""
        self._calls.append(call)
        # In this order no call is forgotten: `_open` takes the flag down before it looks for calls.
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        self._awake = False
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            if self._calls:
                self._loop.call_soon(self._open)


class BatchRun(Generic[ItemT, ResultT]):
    """Runs one batch and carries its results; the engine's `Sink`.

    Attributes:
        batch: its entries.
        mailbox: the way to the event loop.
        started_s: when it began, on the monotonic clock.
        seconds: how long the engine took; zero before its end.
    """

    def __init__(self, batch: Sequence[Entry[ItemT, ResultT]], number: int, mailbox: Mailbox) -> None:
        self.batch = batch
        self.mailbox = mailbox
        self.started_s = time.monotonic()
        self.seconds = 0.0
        self._number = number
        self._answered: set[int] = set()

    @property
    def tokens(self) -> int:
        """Tokens of the batch, padding left out."""
        return sum(entry.tokens for entry in self.batch)

    def run(self, run_batch: RunBatch[ItemT, ResultT]) -> None:
        """Run the batch in this thread; what the engine raises comes out."""
        try:
            run_batch([entry.item for entry in self.batch], self)
        finally:
            self.seconds = time.monotonic() - self.started_s

    def emit(self, position: int, result: ResultT) -> None:
        """See `Sink`."""
        entry = self.batch[position]
        outcome = Outcome(
            index=entry.index,
            result=result,
            batch=self._number,
            queue_s=self.started_s - entry.ticket.arrived_s,
            compute_s=time.monotonic() - self.started_s,
        )
        self._answered.add(position)
        self.mailbox.post(lambda: entry.ticket.deliver(outcome))

    def fail(self, position: int, error: PpodError) -> None:
        """See `Sink`."""
        ticket = self.batch[position].ticket
        self._answered.add(position)
        self.mailbox.post(lambda: ticket.fail(error))

    def abandoned(self, position: int) -> bool:
        """See `Sink`."""
        return self.batch[position].ticket.closed

    def fail_unanswered(self, cause: BaseException | None) -> None:
        """The engine is done: whoever has no result now will never have one."""
        for position in range(len(self.batch)):
            if position not in self._answered:
                self.fail(position, _EngineError.of(cause))


class _EngineError(PpodError):
    """The engine broke; the interceptor logs the cause and tells the caller no more than INTERNAL."""

    @classmethod
    def of(cls, cause: BaseException | None) -> PpodError:
        """The error for a request whose batch ended without a result for it."""
        if isinstance(cause, PpodError):
            return cause
        error = cls("the model failed to run the batch; the server's log has the cause")
        error.__cause__ = cause
        return error
