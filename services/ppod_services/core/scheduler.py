"""One queue for all callers, between the transport and the model.

The scheduler knows neither protobuf nor models: it takes items, and hands batches of them to an engine that runs in
one thread of its own, so that the event loop stays free. Every sequence is one entry, all entries of a request enter
at once. Fairness between callers would choose the leader of a batch in `batching.form_batch`; nothing else changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ppod.errors import Cancelled, DeadlineExceeded, InvalidArgument, PpodError, ResourceExhausted, Unavailable
from ppod_services.core.batching import form_batch, padded_tokens
from ppod_services.core.callers import ANONYMOUS_CALLER, Caller
from ppod_services.core.config import BatchingConfig
from ppod_services.core.metrics import ServiceMetrics

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
ResultT_contra = TypeVar("ResultT_contra", contravariant=True)
JobT = TypeVar("JobT")

_RATE_DECAY = 0.8
_DEFAULT_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0


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


@dataclass(frozen=True, slots=True)
class Submission(Generic[ItemT]):
    """One sequence to run: `tokens` is its cost; only equal `group`s share a batch."""

    item: ItemT
    tokens: int
    group: Hashable = None


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
    """A request in the scheduler. Await its results with `gather`, or take each as it comes with `stream`."""

    def __init__(self, count: int, arrived: float, on_close: Callable[[Ticket[ResultT], str], None]) -> None:
        self.arrived = arrived
        self.closed = False
        self._count = count
        self._left = count
        self._outcomes: asyncio.Queue[Outcome[ResultT] | PpodError] = asyncio.Queue()
        self._on_close = on_close

    async def stream(self) -> AsyncIterator[Outcome[ResultT]]:
        """Yield each outcome as it comes; raise the error of the first entry that failed."""
        left = self._count
        while left:
            outcome = await self._outcomes.get()
            if isinstance(outcome, PpodError):
                raise outcome
            left -= 1
            yield outcome

    async def gather(self) -> list[Outcome[ResultT]]:
        """All outcomes in the request's order."""
        return sorted([outcome async for outcome in self.stream()], key=lambda outcome: outcome.index)

    def deliver(self, outcome: Outcome[ResultT]) -> None:
        """Hand over one outcome."""
        if not self.closed:
            self._outcomes.put_nowait(outcome)
            self._left -= 1
            if not self._left:
                self._close("done")

    def fail(self, error: PpodError, reason: str = "failed") -> None:
        """End the request with an error; entries that still wait leave the queue."""
        if not self.closed:
            self._outcomes.put_nowait(error)
            self._close(reason)

    def cancel(self) -> None:
        """The caller is gone. Harmless after the last outcome."""
        self.fail(Cancelled("the caller went away"), "cancelled")

    def _close(self, reason: str) -> None:
        self.closed = True
        self._on_close(self, reason)


@dataclass(frozen=True, slots=True, eq=False)
class _Entry(Generic[ItemT, ResultT]):
    ticket: Ticket[ResultT]
    index: int
    item: ItemT
    tokens: int
    group: Hashable

    def same_request(self, other: object) -> bool:
        return isinstance(other, _Entry) and other.ticket is self.ticket


class Scheduler(Generic[ItemT, ResultT]):
    """Batches entries of all callers and runs them one batch at a time.

    Args:
        run_batch: the engine; it is called in `executor`'s thread. What it raises fails the whole batch.
        config: bounds of batches and of the queue.
        executor: an executor with a single thread, which also loaded the model.
        metrics: where the queue and the batches are counted.
    """

    def __init__(
        self,
        run_batch: RunBatch[ItemT, ResultT],
        config: BatchingConfig,
        executor: Executor,
        metrics: ServiceMetrics,
    ) -> None:
        self._run_batch = run_batch
        self._config = config
        self._executor = executor
        self._metrics = metrics
        self._queue: list[_Entry[ItemT, ResultT]] = []
        self._queued_tokens = 0
        self._running: list[_Entry[ItemT, ResultT]] = []
        self._arrived = asyncio.Event()
        self._batches = itertools.count(1)
        self._tokens_per_s = 0.0
        self._stopped = False

    def submit(
        self, submissions: Sequence[Submission[ItemT]], deadline_s: float, caller: Caller = ANONYMOUS_CALLER
    ) -> Ticket[ResultT]:
        """Enqueue all sequences of a request at once.

        Args:
            submissions: at least one.
            deadline_s: seconds from now after which the request is worth nothing.
            caller: whose it is.

        Raises:
            ResourceExhausted: the queue is full. InvalidArgument: the request alone would overflow it.
            Unavailable: the scheduler was stopped.
        """
        if self._stopped:
            raise Unavailable("the server is stopping")
        tokens = sum(submission.tokens for submission in submissions)
        self._check_room(tokens)
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def close(closed: Ticket[ResultT], reason: str) -> None:
            for timer in timers:
                timer.cancel()
            self._forget(closed, reason)

        ticket: Ticket[ResultT] = Ticket(len(submissions), time.monotonic(), close)
        expired = DeadlineExceeded(f"no result within the deadline of {deadline_s:.3f} s")
        timers.append(loop.call_later(max(0.0, deadline_s), ticket.fail, expired, "expired"))
        self._queue.extend(
            _Entry(ticket, index, submission.item, submission.tokens, submission.group)
            for index, submission in enumerate(submissions)
        )
        self._queued_tokens += tokens
        self._count_queue()
        self._arrived.set()
        return ticket

    async def exclusive(self, job: Callable[[], JobT]) -> JobT:
        """Run a job in the model's thread between two batches, and return its result.

        The thread is single and batches are handed to it one at a time, so a job waits for one batch at most. A
        caller that goes away leaves a job that has begun to end by itself: nothing is torn in two.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, job)

    async def run(self) -> None:
        """Run batches until cancelled."""
        try:
            while True:
                if self._queue:
                    await self._wait_for_mates()
                    await self._run_next()
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:
            self._stopped = True
            for entry in [*self._queue, *self._running]:
                entry.ticket.fail(Unavailable("the server stopped before the work was done"))

    async def _wait_for_mates(self) -> None:
        """Give an idle service's first entry a moment of company, unless a batch is full already."""
        until = self._queue[0].ticket.arrived + self._config.max_wait_ms / 1_000
        while self._queue and not self._batch_is_full() and (left := until - time.monotonic()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _batch_is_full(self) -> bool:
        return self._queued_tokens >= self._config.max_batch_tokens or len(self._queue) >= self._config.max_batch_size

    async def _run_next(self) -> None:
        batch = form_batch(self._queue, self._config.max_batch_tokens, self._config.max_batch_size)
        if not batch:
            return
        chosen = {id(entry) for entry in batch}
        self._queue = [entry for entry in self._queue if id(entry) not in chosen]
        self._queued_tokens -= _sum_tokens(batch)
        self._count_queue()
        self._running = batch
        loop = asyncio.get_running_loop()
        sink: _BatchSink[ItemT, ResultT] = _BatchSink(loop, batch, next(self._batches))
        running = loop.run_in_executor(self._executor, sink.run, self._run_batch)
        await asyncio.wait({running})
        self._running = []
        error = running.exception()
        if error is None:
            self._record(batch, running.result())
        # Results travel by callbacks queued before this point: whoever has none now will never have one.
        for position in sink.unanswered():
            batch[position].ticket.fail(_EngineError.of(error))

    def _record(self, batch: Sequence[_Entry[ItemT, ResultT]], seconds: float) -> None:
        tokens = _sum_tokens(batch)
        self._metrics.batch(len(batch), tokens, padded_tokens(batch) - tokens, seconds)
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_s = rate if not self._tokens_per_s else _blend(self._tokens_per_s, rate)

    def _check_room(self, tokens: int) -> None:
        most = self._config.max_queue_tokens
        if tokens > most:
            raise InvalidArgument("request", f"{tokens} tokens in all", f"at most {most}, the size of the queue")
        if self._queued_tokens + tokens <= most:
            return
        retry_s = self._queued_tokens / self._tokens_per_s if self._tokens_per_s else _DEFAULT_RETRY_S
        raise ResourceExhausted(
            f"the queue holds {self._queued_tokens} of {most} tokens", min(max(retry_s, 0.01), _LONGEST_RETRY_S)
        )

    def _forget(self, ticket: Ticket[ResultT], reason: str) -> None:
        if reason == "done":
            return
        gone = [entry for entry in self._queue if entry.ticket is ticket]
        self._queue = [entry for entry in self._queue if entry.ticket is not ticket]
        self._queued_tokens -= _sum_tokens(gone)
        self._metrics.dropped(len(gone), reason)
        self._count_queue()

    def _count_queue(self) -> None:
        self._metrics.queue(len(self._queue), self._queued_tokens)


class _BatchSink(Generic[ItemT, ResultT]):
    """Carries results from the model's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, batch: Sequence[_Entry[ItemT, ResultT]], number: int) -> None:
        self._loop = loop
        self._batch = batch
        self._number = number
        self._started = 0.0
        self._answered: set[int] = set()

    def run(self, run_batch: RunBatch[ItemT, ResultT]) -> float:
        """Run the batch in this thread; return its seconds."""
        self._started = time.monotonic()
        run_batch([entry.item for entry in self._batch], self)
        return time.monotonic() - self._started

    def emit(self, position: int, result: ResultT) -> None:
        entry = self._batch[position]
        outcome = Outcome(
            index=entry.index,
            result=result,
            batch=self._number,
            queue_s=self._started - entry.ticket.arrived,
            compute_s=time.monotonic() - self._started,
        )
        self._answered.add(position)
        self._loop.call_soon_threadsafe(entry.ticket.deliver, outcome)

    def fail(self, position: int, error: PpodError) -> None:
        self._answered.add(position)
        self._loop.call_soon_threadsafe(self._batch[position].ticket.fail, error)

    def abandoned(self, position: int) -> bool:
        return self._batch[position].ticket.closed

    def unanswered(self) -> list[int]:
        """Positions without a result or an error."""
        return [position for position in range(len(self._batch)) if position not in self._answered]


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


def _sum_tokens(entries: Iterable[_Entry[ItemT, ResultT]]) -> int:
    return sum(entry.tokens for entry in entries)


def _blend(kept: float, new: float) -> float:
    return _RATE_DECAY * kept + (1 - _RATE_DECAY) * new
