"""Engines that work in steps: who joins a batch that runs, and who has the model between two steps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from ppod.errors import FailedPrecondition
from ppod_services.core.batching import BatchBounds
from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.core.claims import Claims
from ppod_services.core.config import BatchingConfig
from ppod_services.core.fair_queue import FairQueue
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.scheduler import JoinableSink, Pause, Scheduler, Submission

LONG_S = 60.0


@dataclass(slots=True)
class Row:
    position: int
    wanted: int
    done: int = 0


class StepEngine:
    """Counts each item up to itself, one a step; each step needs a permit. Emits how far it came."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.rows: list[list[int]] = []
        self.runs = 0
        self.waits = False

    def run(self, items: Sequence[int], sink: JoinableSink[int, int]) -> None:
        self.runs += 1
        rows = [Row(position, wanted) for position, wanted in enumerate(items)]
        seen = len(rows)
        while rows:
            self.waits = True
            assert self.permits.acquire(timeout=10)
            self.waits = False
            self.rows.append([row.wanted for row in rows])
            for row in rows:
                row.done += 1
                if row.done == row.wanted:
                    sink.emit(row.position, row.done)
            rows = [row for row in rows if row.done < row.wanted and not sink.abandoned(row.position)]
            if sink.between_steps():
                for row in rows:
                    sink.emit(row.position, row.done)
                return
            for wanted in sink.more():
                rows.append(Row(seen, wanted))
                seen += 1

    def steps(self, count: int) -> None:
        self.permits.release(count)


@asynccontextmanager
async def scheduling(
    engine: StepEngine, *, batch_tokens: int = 100, size: int = 64
) -> AsyncIterator[Scheduler[int, int]]:
    config = BatchingConfig(max_batch_tokens=batch_tokens, max_batch_size=size, max_queue_tokens=1000, max_wait_ms=0)
    with ThreadPoolExecutor(1) as executor:
        scheduler: Scheduler[int, int] = Scheduler(engine.run, config, executor, ServiceMetrics())
        task = asyncio.create_task(scheduler.run())
        try:
            yield scheduler
        finally:
            engine.steps(1000)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def work(*items: int, tokens: int = 1) -> list[Submission[int]]:
    return [Submission(item, tokens) for item in items]


async def until(engine: StepEngine, steps: int) -> None:
    """Let the engine make steps, and wait until it has made so many in all and waits for a permit to the next one."""
    engine.steps(steps - len(engine.rows))
    async with asyncio.timeout(5):
        while len(engine.rows) < steps or not engine.waits:
            await asyncio.sleep(0.001)


async def finished(task: asyncio.Task[list[int]]) -> list[int]:
    async with asyncio.timeout(5):
        return await task


def start(scheduler: Scheduler[int, int], *items: int, tokens: int = 1) -> asyncio.Task[list[int]]:
    ticket = scheduler.submit(work(*items, tokens=tokens), LONG_S)

    async def results() -> list[int]:
        return [outcome.result for outcome in await ticket.gather()]

    return asyncio.create_task(results())


async def test_a_newcomer_joins_and_does_not_wait_for_the_longest() -> None:
    engine = StepEngine()
    async with scheduling(engine) as scheduler:
        long = start(scheduler, 50)
        await until(engine, 2)
        short = start(scheduler, 3, 4)
        await until(engine, 10)
        assert await finished(short) == [3, 4]
        assert not long.done()
        engine.steps(50)
        assert await finished(long) == [50]
    assert engine.runs == 1
    assert [3, 4] in [sorted(rows)[:2] for rows in engine.rows]


async def test_nobody_joins_beyond_the_bounds() -> None:
    engine = StepEngine()
    async with scheduling(engine, batch_tokens=30, size=3) as scheduler:
        tasks = [start(scheduler, 20, tokens=10)]
        await until(engine, 1)
        tasks += [start(scheduler, item, tokens=10) for item in (5, 6, 7, 8)]
        engine.steps(200)
        assert [await finished(task) for task in tasks] == [[20], [5], [6], [7], [8]]
    assert max(len(rows) for rows in engine.rows) == 3
    assert engine.runs == 1


def test_an_urgent_sequence_that_does_not_fit_lets_nobody_past() -> None:
    queue: FairQueue[Sized] = FairQueue(0)
    running = [Sized(10), Sized(10)]
    bounds = BatchBounds(max_tokens=40, max_size=8, overhead_tokens=2**24)
    queue.add("large", ANONYMOUS_CALLER, [Sized(40)], now_s=0.0, expires_s=10.0)
    queue.add("small", ANONYMOUS_CALLER, [Sized(5), Sized(10)], now_s=0.0, expires_s=100.0)
    assert [one.tokens for one in queue.join(running, bounds, 1.0)] == [10, 5]
    queue.add("small again", ANONYMOUS_CALLER, [Sized(5)], now_s=1.0, expires_s=100.0)
    # At half of its time the large one has waited enough: the batch must run dry for it.
    assert queue.join(running, bounds, 5.0) == []
    assert [one.tokens for one in queue.take(bounds, 5.0)] == [40]


@dataclass(frozen=True)
class Sized:
    tokens: int
    group: None = None
    packed: bool = False


async def test_wait_finishes_what_runs_and_lets_nobody_join() -> None:
    engine = StepEngine()
    async with scheduling(engine) as scheduler:
        running = start(scheduler, 5)
        await until(engine, 1)
        job = asyncio.create_task(scheduler.exclusive(lambda: len(engine.rows)))
        await asyncio.sleep(0.01)
        newcomer = start(scheduler, 1)
        await until(engine, 4)
        assert not job.done()
        engine.steps(2)
        assert await finished(running) == [5]
        assert await finished(newcomer) == [1]
        assert await job == 5
    assert engine.rows == [[5]] * 5 + [[1]]


async def test_keep_runs_between_two_steps() -> None:
    engine = StepEngine()
    async with scheduling(engine) as scheduler:
        running = start(scheduler, 5)
        await until(engine, 2)
        job = asyncio.create_task(scheduler.exclusive(lambda: len(engine.rows), Pause.KEEP))
        await asyncio.sleep(0.01)
        engine.steps(1)
        assert await asyncio.wait_for(job, 5) == 3
        assert not running.done()
        engine.steps(2)
        assert await finished(running) == [5]
    assert engine.runs == 1


async def test_abort_hands_back_what_there_is() -> None:
    engine = StepEngine()
    async with scheduling(engine) as scheduler:
        running = start(scheduler, 9, 3)
        await until(engine, 3)
        job = asyncio.create_task(scheduler.exclusive(lambda: len(engine.rows), Pause.ABORT))
        await asyncio.sleep(0.01)
        engine.steps(1)
        assert await finished(running) == [4, 3]
        assert await job == 4


@pytest.mark.parametrize("pause", [Pause.WAIT, Pause.ABORT])
async def test_a_claim_goes_with_its_caller(pause: Pause) -> None:
    engine = StepEngine()
    async with scheduling(engine) as scheduler:
        running = start(scheduler, 9)
        async with asyncio.timeout(5):
            while not engine.waits:
                await asyncio.sleep(0.001)
        # The first step has no permit yet, so the claim comes and goes before anybody looks for it.
        job = asyncio.create_task(scheduler.exclusive(lambda: None, pause))
        await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        newcomer = start(scheduler, 2)
        engine.steps(3)
        assert await finished(newcomer) == [2]
        assert not running.done()
        engine.steps(6)
        assert await finished(running) == [9]
    assert engine.runs == 1


async def test_a_job_that_fails_tells_its_caller_and_the_batch_goes_on() -> None:
    engine = StepEngine()

    def fail() -> None:
        raise FailedPrecondition("weight_version", "1", "2")

    async with scheduling(engine) as scheduler:
        running = start(scheduler, 3)
        await until(engine, 1)
        job = asyncio.create_task(scheduler.exclusive(fail, Pause.KEEP))
        await asyncio.sleep(0.01)
        engine.steps(2)
        with pytest.raises(FailedPrecondition):
            await asyncio.wait_for(job, 5)
        assert await finished(running) == [3]


async def test_a_long_run_is_booked_while_it_goes_on() -> None:
    """Rates and metrics must not wait for an end that may never come, nor may a run remember all that it did."""
    engine = StepEngine()
    async with scheduling(engine) as scheduler:
        endless = start(scheduler, 500)
        await until(engine, 1)
        for _ in range(3):
            task = start(scheduler, 1, tokens=7)
            await until(engine, len(engine.rows) + 2)
            assert await finished(task) == [1]
            await asyncio.sleep(0.25)
        await until(engine, len(engine.rows) + 1)
        await asyncio.sleep(0.05)
        served = scheduler._metrics.registry.get_sample_value(
            "ppod_team_served_tokens_total", {"team": ANONYMOUS_CALLER.team.name}
        )
        assert served is not None
        assert 14 <= served <= 21
        assert not endless.done()
        engine.steps(500)
        assert await finished(endless) == [500]


def test_claims_keep_their_order_and_can_be_taken_back() -> None:
    claims, ran = Claims(), []
    claims.add(lambda: ran.append("keep"), Pause.KEEP)
    gone = claims.add(lambda: ran.append("gone"), Pause.KEEP)
    claims.add(lambda: ran.append("abort"), Pause.ABORT)
    claims.add(lambda: ran.append("late"), Pause.KEEP)
    aborting = claims.add(lambda: ran.append("gone"), Pause.ABORT)
    assert gone.cancel()
    assert len(claims) == 4
    assert aborting.cancel()
    assert len(claims) == 3
    assert claims.abort
    claims.run(frozenset((Pause.KEEP,)))
    assert ran == ["keep"]
    assert len(claims) == 2
    claims.run()
    assert ran == ["keep", "abort", "late"]
    assert not claims
    assert not claims.abort
