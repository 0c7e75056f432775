"""One batch on its way through the model's thread, and its results on their way to the event loop.

An engine that works in steps, as generation does, may let others join a batch that runs (`JoinableSink.more`), and
lets those who wait for the model have it between two steps (`JoinableSink.between_steps`).
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from ppod.errors import PpodError
from ppod_services.core.tickets import Outcome, Ticket

ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)
ResultT = TypeVar("ResultT")
ResultT_contra = TypeVar("ResultT_contra", contravariant=True)


class Pause(enum.Enum):
    """What becomes of sequences under way when somebody asks for the model to themselves.

    WAIT: they are finished first. KEEP: they stand still, and go on afterwards. ABORT: they are handed back unfinished.
    Where an engine does not work in steps, all three wait for the end of the batch.
    """

    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"


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


class JoinableSink(Sink[ResultT_contra], Protocol[ItemT_co, ResultT_contra]):
    """What an engine that works in steps is given besides."""

    def more(self) -> Sequence[ItemT_co]:
        """Items that join the batch now; their positions follow those of all before.

        Empty where nothing fits that waits, or where somebody waits for the model. Cheap enough to call at each step.
        """
        ...

    def between_steps(self) -> bool:
        """Let those have the model who may while sequences stand still. Call it between any two steps.

        Returns:
            True when the engine must emit all that it has, finished or not, and return.
        """
        ...


RunBatch = Callable[[Sequence[ItemT], JoinableSink[ItemT, ResultT]], None]


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


@dataclass(frozen=True, slots=True, eq=False)
class Ran(Generic[ItemT, ResultT]):
    """An entry that was run, when it joined its batch, on the monotonic clock, and the tokens that it took at most."""

    entry: Entry[ItemT, ResultT]
    joined_s: float
    taken: int


@dataclass(frozen=True, slots=True, eq=False)
class Stretch(Generic[ItemT, ResultT]):
    """A part of a run, for the books: those that were answered in it, and its seconds.

    A run that others join may go on for as long as there is work; it is booked in stretches.
    """

    answered: Sequence[Ran[ItemT, ResultT]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of those that were answered, padding left out, as they were submitted."""
        return sum(ran.entry.tokens for ran in self.answered)

    @property
    def taken(self) -> int:
        """Tokens that they took: fewer, where they had room for more."""
        return sum(ran.taken for ran in self.answered)


class RunHost(Protocol[ItemT, ResultT]):
    """What a run asks of the scheduler; in the model's thread."""

    def joining(self, run: BatchRun[ItemT, ResultT]) -> Sequence[Entry[ItemT, ResultT]]:
        """Take out of the queue who joins the run now."""
        ...

    def between_steps(self) -> bool:
        """See `JoinableSink`."""
        ...

    def taken(self, entry: Entry[ItemT, ResultT], result: ResultT) -> int:
        """Tokens that an entry took."""
        ...


class BatchRun(Generic[ItemT, ResultT]):
    """Runs one batch and carries its results; the engine's `JoinableSink`.

    Attributes:
        mailbox: the way to the event loop.
    """

    def __init__(
        self,
        batch: Sequence[Entry[ItemT, ResultT]],
        number: int,
        mailbox: Mailbox,
        host: RunHost[ItemT, ResultT],
    ) -> None:
        self.mailbox = mailbox
        self._first = batch
        self._number = number
        self._host = host
        self._stretch_s = time.monotonic()
        self._count = 0
        self._active: dict[int, Ran[ItemT, ResultT]] = {}
        self._answered: list[Ran[ItemT, ResultT]] = []
        self._join(batch)

    @property
    def active(self) -> list[Entry[ItemT, ResultT]]:
        """The entries that have no result yet, the oldest first."""
        return [ran.entry for ran in self._active.values()]

    @property
    def stretch_s(self) -> float:
        """Seconds since the last stretch ended."""
        return time.monotonic() - self._stretch_s

    @property
    def answered(self) -> bool:
        """Whether the present stretch has a result."""
        return bool(self._answered)

    def run(self, run_batch: RunBatch[ItemT, ResultT]) -> None:
        """Run the batch in this thread; what the engine raises comes out."""
        run_batch([entry.item for entry in self._first], self)

    def end_stretch(self) -> Stretch[ItemT, ResultT]:
        """What happened since the last stretch ended."""
        now_s = time.monotonic()
        stretch = Stretch(self._answered, now_s - self._stretch_s)
        self._answered, self._stretch_s = [], now_s
        return stretch

    def emit(self, position: int, result: ResultT) -> None:
        """See `Sink`."""
        entry = self._active[position].entry
        ran = self._answer(position, self._host.taken(entry, result))
        outcome = Outcome(
            index=ran.entry.index,
            result=result,
            batch=self._number,
            queue_s=ran.joined_s - ran.entry.ticket.arrived_s,
            compute_s=time.monotonic() - ran.joined_s,
        )
        self.mailbox.post(lambda: ran.entry.ticket.deliver(outcome))

    def fail(self, position: int, error: PpodError) -> None:
        """See `Sink`."""
        ticket = self._answer(position).entry.ticket
        self.mailbox.post(lambda: ticket.fail(error))

    def abandoned(self, position: int) -> bool:
        """See `Sink`. An entry that is dropped counts as answered: its tokens were computed."""
        gone = self._active[position].entry.ticket.closed
        if gone:
            self._answer(position)
        return gone

    def more(self) -> Sequence[ItemT]:
        """See `JoinableSink`."""
        joined = self._host.joining(self)
        self._join(joined)
        return [entry.item for entry in joined]

    def between_steps(self) -> bool:
        """See `JoinableSink`."""
        return self._host.between_steps()

    def fail_unanswered(self, cause: BaseException | None) -> None:
        """The engine is done: whoever has no result now will never have one."""
        for position in list(self._active):
            self.fail(position, _EngineError.of(cause))

    def _join(self, entries: Sequence[Entry[ItemT, ResultT]]) -> None:
        now_s = time.monotonic()
        for entry in entries:
            self._active[self._count] = Ran(entry, now_s, entry.tokens)
            self._count += 1

    def _answer(self, position: int, taken: int | None = None) -> Ran[ItemT, ResultT]:
        ran = self._active.pop(position)
        ran = ran if taken is None else replace(ran, taken=taken)
        self._answered.append(ran)
        return ran


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
