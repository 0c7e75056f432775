"""One queue for all callers, between the transport and the model.

The scheduler knows neither protobuf nor models: it takes items, and hands batches of them to an engine that runs in
one thread of its own, so that the event loop stays free. Every sequence is one entry, all entries of a request enter
at once. Who is next is the queue's choice (`fair_queue`), who may enter the admission's (`admission`).

The model's thread takes each batch out of the queue itself, the moment that the one before has ended: it never waits
for the event loop, which may be busy with callers, and yet nothing is chosen before its time. An idle service starts
at once for a caller who is alone, and waits up to `max_wait_ms` where callers overlap (`company`). An engine that works
in steps takes those who come later into the batch that runs (`batch_run`).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

from ppod.errors import DeadlineExceeded, Unavailable
from ppod_services.core.admission import Admission, Request
from ppod_services.core.batch_run import BatchRun, Entry, JoinableSink, Mailbox, Pause, RunBatch, Sink, Stretch
from ppod_services.core.batching import BatchBounds, computed_tokens
from ppod_services.core.broken import broken_device
from ppod_services.core.callers import ANONYMOUS_CALLER, Caller, current_request_id
from ppod_services.core.claims import Claims
from ppod_services.core.company import Company
from ppod_services.core.config import BatchingConfig
from ppod_services.core.fair_queue import STEADY_S, FairQueue
from ppod_services.core.metrics import BatchFigures, ServiceMetrics
from ppod_services.core.quotas import Quotas
from ppod_services.core.rate import ComputeRate
from ppod_services.core.tickets import Outcome, Submission, Ticket

__all__ = ["JoinableSink", "Outcome", "Pause", "RunBatch", "Scheduler", "Sink", "Submission", "Ticket"]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
JobT = TypeVar("JobT")

_RECORD_DELAY_S = 0.005
_STRETCH_S = 0.5
"""A batch that others join is booked this often: its rate is news, and metrics show what was done."""
_STANDING = frozenset((Pause.KEEP,))
_ANSWER_S = 0.05
"""A request ends this much before its deadline, so that its caller hears why, and does not just give up."""


class Scheduler(Generic[ItemT, ResultT]):
    """Batches entries of all callers and runs them one batch at a time.

    Args:
        run_batch: the engine; it is called in `executor`'s thread. What it raises fails the whole batch.
        config: bounds of batches and of the queue.
        executor: an executor with a single thread, which also loaded the model.
        metrics: where the queue and the batches are counted.
        quotas: what the teams' quotas have left; schedulers of one process may share it.
        taken: tokens that an item and its result took, for metrics; None: those that it was submitted with.
    """

    def __init__(
        self,
        run_batch: RunBatch[ItemT, ResultT],
        config: BatchingConfig,
        executor: Executor,
        metrics: ServiceMetrics,
        quotas: Quotas | None = None,
        taken: Callable[[ItemT, ResultT], int] | None = None,
    ) -> None:
        self._run_batch = run_batch
        self._taken = taken
        self._config = config
        self._executor = executor
        self._metrics = metrics
        self._queue: FairQueue[Entry[ItemT, ResultT]] = FairQueue(config.catch_up_tokens)
        self._rate = ComputeRate()
        self._admission = Admission(config, self._queue, self._rate, quotas or Quotas(), metrics.refused)
        metrics.queue_capacity(config.max_queue_tokens)
        self._company = Company()
        self._open: set[Ticket[ResultT]] = set()
        self._claims = Claims()
        self._batches = itertools.count(1)
        # Guards the queue, admission, the rate and the flags below: the model's thread takes batches itself.
        self._lock = threading.Lock()
        self._serving = False
        self._stopped = False
        self._busy = False
        self._run: BatchRun[ItemT, ResultT] | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._mailbox: Mailbox | None = None
        self._broken: asyncio.Future[None] | None = None  # is done where no batch can be run any more

    def submit(
        self, submissions: Sequence[Submission[ItemT]], deadline_s: float, caller: Caller = ANONYMOUS_CALLER
    ) -> Ticket[ResultT]:
        """Enqueue all sequences of a request at once.

        Args:
            submissions: at least one.
            deadline_s: seconds from now after which the request is worth nothing.
            caller: whose it is.

        Raises:
            ResourceExhausted: a quota is spent, the queue is full, or the deadline would pass in the queue; it tells
            when to come back. InvalidArgument: the request alone would overflow a bound. Unavailable: the scheduler
            was stopped.
        """
        if self._stopped:
            raise Unavailable("the server is stopping")
        now_s = time.monotonic()
        tokens = sum(submission.tokens for submission in submissions)
        request = Request(tokens, len(submissions), deadline_s, caller, current_request_id.get())
        with self._lock:
            self._admission.admit(request, now_s)
        ticket = self._open_ticket(len(submissions), tokens, deadline_s, caller)
        entries = [
            Entry(ticket, caller.team.name, index, one.item, one.tokens, one.group, one.packed)
            for index, one in enumerate(submissions)
        ]
        with self._lock:
            self._queue.add(ticket, caller, entries, now_s, ticket.expires_s)
        self._metrics.accepted(caller.team.name, tokens)
        self._count_queue([caller.team.name])
        self._company.arrived(len(self._open), now_s)
        self._start_soon(now_s)
        return ticket

    async def exclusive(self, job: Callable[[], JobT], pause: Pause = Pause.WAIT) -> JobT:
        """Run a job in the model's thread while no batch runs, or none moves, and return its result.

        The thread is single, and the next batch queues up for it only when the one before has ended, so a job waits
        for one batch at most; `pause` says what becomes of that. A caller that goes away leaves a job that has begun
        to end by itself: nothing is torn in two.
        """
        future = self._claims.add(job, pause)
        self._executor.submit(self._claims.run)
        return await asyncio.wrap_future(future)

    def joining(self, run: BatchRun[ItemT, ResultT]) -> Sequence[Entry[ItemT, ResultT]]:
        """Take out of the queue who joins a batch that runs; in the model's thread."""
        if run.answered and run.stretch_s >= _STRETCH_S:
            self._book(run, None)
        running = run.active
        if self._claims or not running or not len(self._queue):
            return []
        now_s = time.monotonic()
        with self._lock:
            joined = [] if self._stopped else self._queue.join(running, self._bounds(now_s), now_s)
            if joined:
                self._rate.started(sum(entry.tokens for entry in (*running, *joined)), now_s)
        return joined

    def between_steps(self) -> bool:
        """Give the model to those who let sequences stand still; tell whether somebody wants them handed back."""
        if not self._claims:
            return False
        self._claims.run(_STANDING)
        return self._claims.abort

    def taken(self, entry: Entry[ItemT, ResultT], result: ResultT) -> int:
        """Tokens that an entry took; in the model's thread."""
        return entry.tokens if self._taken is None else self._taken(entry.item, result)

    async def run(self) -> None:
        """Run batches until cancelled. Raises ServiceBroken: the engine's device is lost."""
        loop = asyncio.get_running_loop()
        self._broken = loop.create_future()
        self._mailbox = Mailbox(loop)
        self._serving = True
        self._start()
        try:
            await self._broken
        finally:
            with self._lock:
                self._stopped = True
            for ticket in list(self._open):
                ticket.fail(Unavailable("the server stopped before the work was done"))

    def _open_ticket(self, count: int, tokens: int, deadline_s: float, caller: Caller) -> Ticket[ResultT]:
        def close(closed: Ticket[ResultT], reason: str) -> None:
            timer.cancel()
            self._close(closed, tokens, caller, reason)

        now_s = time.monotonic()
        expired = DeadlineExceeded(f"no result within the deadline of {deadline_s:.3f} s")
        left_s = max(0.0, deadline_s - min(_ANSWER_S, deadline_s / 20))
        ticket: Ticket[ResultT] = Ticket(count, now_s, now_s + left_s, close)
        timer = asyncio.get_running_loop().call_later(left_s, ticket.fail, expired, "expired")
        self._open.add(ticket)
        return ticket

    def _close(self, ticket: Ticket[ResultT], tokens: int, caller: Caller, reason: str) -> None:
        """A request ended: what still waits of it leaves the queue before it costs compute."""
        self._open.discard(ticket)
        with self._lock:
            gone = self._queue.remove(ticket) if reason != "done" else []
            self._admission.leave(caller.team, tokens)
        if gone:
            self._metrics.dropped(len(gone), reason)
            self._count_queue([caller.team.name])

    def _start_soon(self, now_s: float) -> None:
        """Start the model's thread unless it runs, at once or when company had its chance to come."""
        if self._busy or not self._serving:
            return
        expected = self._company.expected(now_s)
        alone = self._queue.requests >= expected or self._queue_fills_a_batch()
        if alone or not self._config.max_wait_ms:
            self._start()
        elif self._waiting is None:
            loop = asyncio.get_running_loop()
            self._waiting = loop.call_later(self._config.max_wait_ms / 1_000, self._start)

    def _queue_fills_a_batch(self) -> bool:
        queue, config = self._queue, self._config
        return queue.tokens >= config.max_batch_tokens or len(queue) >= config.max_batch_size

    def _start(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        with self._lock:
            if self._busy or self._stopped or not len(self._queue):
                return
            self._busy = True
        self._submit_batch()

    def _submit_batch(self) -> None:
        self._executor.submit(self._run_next).add_done_callback(self._go_on)

    def _run_next(self) -> None:
        """Take a batch and run it; in the model's thread."""
        self._run = self._take()
        if self._run is not None:
            self._run.run(self._run_batch)

    def _take(self) -> BatchRun[ItemT, ResultT] | None:
        assert self._mailbox is not None
        now_s = time.monotonic()
        with self._lock:
            bounds = self._bounds(now_s)
            # Where others wait, compute for what ends too late would be theirs.
            shared = self._queue.requests > 1
            needed_s = self._rate.seconds(min(self._queue.tokens, bounds.max_tokens)) if shared else 0.0
            late = self._queue.expire(now_s + needed_s)
            batch = self._queue.take(bounds, now_s)
            if late:
                self._admission.missed()
            if batch:
                self._rate.started(sum(entry.tokens for entry in batch), now_s)
        if late:
            self._metrics.dropped(len(late), "expired")
            self._mailbox.post(lambda: self._expire(late))
        return BatchRun(batch, next(self._batches), self._mailbox, self) if batch else None

    def _expire(self, late: Sequence[Entry[ItemT, ResultT]]) -> None:
        for entry in late:
            entry.ticket.fail(DeadlineExceeded("the deadline is nearer than the end of the next batch"), "expired")
        self._count_queue({entry.team for entry in late})

    def _bounds(self, now_s: float) -> BatchBounds:
        config = self._config
        shared = self._queue.teams_since(now_s - STEADY_S) > 1
        most = config.contended_batch_tokens if shared else config.max_batch_tokens
        if self._queue.requests > 1 and self._rate.tokens_per_s:
            # Never for a request that is alone: its batches must not depend on a clock.
            most = min(most, max(1, int(self._rate.tokens_per_s * config.max_batch_s)))
        return BatchBounds(most, config.max_batch_size, config.batch_overhead_tokens)

    def _go_on(self, done: Future[None]) -> None:
        """A batch ended, and the next one follows; in the model's thread."""
        run, self._run = self._run, None
        try:
            if run is not None:
                self._settle(run, done.exception())
        finally:
            with self._lock:
                self._busy = bool(len(self._queue)) and not self._stopped
            if self._busy:
                self._submit_batch()

    def _settle(self, run: BatchRun[ItemT, ResultT], error: BaseException | None) -> None:
        run.fail_unanswered(error)
        self._book(run, error)

    def _book(self, run: BatchRun[ItemT, ResultT], error: BaseException | None) -> None:
        """End a stretch of a run; in the model's thread."""
        stretch = run.end_stretch()
        left = sum(entry.tokens for entry in run.active)
        with self._lock:
            if error is None:
                self._admission.kept()
                self._rate.finished(stretch.tokens, stretch.seconds, saturated=bool(left or len(self._queue)))
            else:
                self._rate.failed()
            if left:
                self._rate.started(left, time.monotonic())
        # The loop counts, and later: this thread has a batch to run, and the loop has answers to send.
        run.mailbox.post(lambda: self._record_soon(stretch, error))

    def _record_soon(self, stretch: Stretch[ItemT, ResultT], error: BaseException | None) -> None:
        if (broken := broken_device(error)) is not None and self._broken is not None and not self._broken.done():
            self._broken.set_exception(broken)
        asyncio.get_running_loop().call_later(_RECORD_DELAY_S, self._record, stretch, error)

    def _record(self, stretch: Stretch[ItemT, ResultT], error: BaseException | None) -> None:
        metrics = self._metrics
        served: dict[str, int] = {}
        for ran in stretch.answered:
            entry = ran.entry
            served[entry.team] = served.get(entry.team, 0) + ran.taken
            if not entry.ticket.begun:
                entry.ticket.begun = True
                metrics.waited(entry.team, ran.joined_s - entry.ticket.arrived_s)
        # A run that others join may end with a stretch in which nobody was answered.
        if error is None and stretch.answered:
            entries = [ran.entry for ran in stretch.answered]
            padded, most = computed_tokens(entries), self._config.max_batch_tokens
            padding = padded - stretch.tokens
            metrics.batch(BatchFigures(len(entries), stretch.taken, padding, padded / most, stretch.seconds))
            for team, tokens in served.items():
                metrics.served(team, tokens)
        self._count_queue(served)

    def _count_queue(self, teams: Iterable[str]) -> None:
        self._metrics.queue(len(self._queue), self._queue.tokens)
        for team in teams:
            self._metrics.team_queue(team, self._queue.team_tokens(team))
