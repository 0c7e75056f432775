"""The queue between callers and model: what reaches the engine, what never does, and what callers are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

import pytest
import torch

from ppod.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NonFiniteOutput,
    PpodError,
    ResourceExhausted,
    Unavailable,
)
from ppod_services.core.broken import ServiceBroken
from ppod_services.core.callers import Caller, Team
from ppod_services.core.config import BatchingConfig
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.scheduler import Scheduler, Sink, Submission

LONG_S = 60.0


class Engine:
    """Doubles numbers; remembers its batches; waits at a gate that starts open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.silent = False

    def run(self, items: Sequence[int], sink: Sink[int]) -> None:
        self.batches.append(list(items))
        self.entered.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        for position, item in enumerate(items):
            if item < 0:
                sink.fail(position, NonFiniteOutput("score", position, "nan"))
            elif not self.silent:
                sink.emit(position, 2 * item)


@asynccontextmanager
async def scheduling(
    engine: Engine,
    *,
    batch_tokens: int = 100,
    queue_tokens: int = 1000,
    wait_ms: float = 0.0,
    metrics: ServiceMetrics | None = None,
) -> AsyncIterator[Scheduler[int, int]]:
    config = BatchingConfig(max_batch_tokens=batch_tokens, max_queue_tokens=queue_tokens, max_wait_ms=wait_ms)
    with ThreadPoolExecutor(1) as executor:
        scheduler: Scheduler[int, int] = Scheduler(engine.run, config, executor, metrics or ServiceMetrics())
        task = asyncio.create_task(scheduler.run())
        try:
            yield scheduler
        finally:
            engine.gate.set()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def submissions(*items: int, tokens: int = 1) -> list[Submission[int]]:
    return [Submission(item, tokens) for item in items]


async def settled(executor: ThreadPoolExecutor) -> None:
    """Wait until the model's thread has booked its last batch, which it does after its results are out."""
    await asyncio.get_running_loop().run_in_executor(executor, lambda: None)


async def blocked(engine: Engine, scheduler: Scheduler[int, int], tokens: int = 1) -> asyncio.Task[object]:
    """Occupy the engine with a batch of its own until its gate opens."""
    engine.gate.clear()
    engine.entered.clear()
    task: asyncio.Task[object] = asyncio.create_task(scheduler.submit(submissions(999, tokens=tokens), LONG_S).gather())  # pyright: ignore
    await asyncio.to_thread(engine.entered.wait, 5)
    return task


async def test_results_keep_the_order_of_the_request() -> None:
    engine = Engine()
    async with scheduling(engine, batch_tokens=8) as scheduler:
        ticket = scheduler.submit([Submission(item, tokens) for item, tokens in ((1, 2), (2, 8), (3, 4))], LONG_S)
        outcomes = await ticket.gather()
    assert [outcome.result for outcome in outcomes] == [2, 4, 6]
    assert engine.batches == [[2], [3, 1]]
    assert all(outcome.queue_s >= 0 and outcome.compute_s >= 0 for outcome in outcomes)


async def test_a_lone_request_gets_the_same_batches_each_time() -> None:
    engine = Engine()
    request = [Submission(item, 1 + (item * 7) % 13) for item in range(40)]
    async with scheduling(engine, batch_tokens=40, wait_ms=1) as scheduler:
        for _ in range(5):
            await scheduler.submit(request, LONG_S).gather()
    per_request = len(engine.batches) // 5
    first = engine.batches[:per_request]
    assert per_request > 3
    assert [engine.batches[start : start + per_request] for start in range(0, 5 * per_request, per_request)] == [
        first
    ] * 5


async def test_callers_share_a_batch() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        block = await blocked(engine, scheduler)
        tickets = [scheduler.submit(submissions(item), LONG_S) for item in (1, 2, 3)]
        engine.gate.set()
        results = [(await ticket.gather())[0].result for ticket in tickets]
        await block
    assert results == [2, 4, 6]
    assert engine.batches[1:] == [[1, 2, 3]]


async def test_a_lone_caller_does_not_wait_for_company() -> None:
    engine = Engine()
    async with scheduling(engine, wait_ms=1_000) as scheduler:
        for item in range(5):
            await asyncio.wait_for(scheduler.submit(submissions(item), LONG_S).gather(), 0.5)
    assert engine.batches == [[0], [1], [2], [3], [4]]


async def test_callers_that_overlap_are_waited_for_no_longer_than_told() -> None:
    engine = Engine()
    async with scheduling(engine, wait_ms=200) as scheduler:
        block = await blocked(engine, scheduler)
        beside = scheduler.submit(submissions(0), LONG_S)
        engine.gate.set()
        await asyncio.gather(beside.gather(), block)
        first = scheduler.submit(submissions(1), LONG_S)
        await asyncio.sleep(0.02)
        second = scheduler.submit(submissions(2), LONG_S)
        # The two that were open together are here again, so the rest of the wait is spared.
        await asyncio.wait_for(asyncio.gather(first.gather(), second.gather()), 0.15)
        await asyncio.wait_for(scheduler.submit(submissions(3), LONG_S).gather(), 0.5)
    assert engine.batches[2:] == [[1, 2], [3]]


async def test_cancelled_entries_never_reach_the_engine() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        block = await blocked(engine, scheduler)
        gone = scheduler.submit(submissions(7, 8), LONG_S)
        kept = scheduler.submit(submissions(1), LONG_S)
        gone.cancel()
        engine.gate.set()
        await kept.gather()
        await block
        with pytest.raises(Cancelled):
            await gone.gather()
    assert engine.batches[1:] == [[1]]


async def test_what_is_dropped_for_being_late_waits_no_more_by_the_metrics_either() -> None:
    engine, metrics = Engine(), ServiceMetrics()

    def waiting() -> tuple[float | None, float | None]:
        value = metrics.registry.get_sample_value
        return value("ppod_queue_tokens"), value("ppod_team_queue_tokens", {"team": "late"})

    async with scheduling(engine, metrics=metrics) as scheduler:
        # 100 tokens take 1 s, by which the others would end too late once they may begin.
        block = await blocked(engine, scheduler, tokens=100)
        await asyncio.sleep(1.0)
        engine.gate.set()
        await block
        block = await blocked(engine, scheduler)
        late = [scheduler.submit(submissions(item, tokens=20), 1.5, Caller(Team("late"))) for item in (1, 2)]
        assert waiting() == (40, 40)
        await asyncio.sleep(1.3)
        engine.gate.set()
        for ticket in late:
            with pytest.raises(DeadlineExceeded):
                await ticket.gather()
        await block
        await asyncio.sleep(0.1)
        assert waiting() == (0, 0)


async def test_expired_entries_never_reach_the_engine() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        block = await blocked(engine, scheduler)
        late = scheduler.submit(submissions(7), 0.02)
        with pytest.raises(DeadlineExceeded):
            await late.gather()
        engine.gate.set()
        await block
        await scheduler.submit(submissions(1), LONG_S).gather()
    assert engine.batches[1:] == [[1]]


async def test_a_full_queue_says_when_to_come_back_and_cancelling_makes_room() -> None:
    engine = Engine()
    async with scheduling(engine, queue_tokens=100) as scheduler:
        block = await blocked(engine, scheduler)
        filling = scheduler.submit(submissions(1, tokens=60), LONG_S)
        with pytest.raises(ResourceExhausted) as caught:
            scheduler.submit(submissions(2, tokens=41), LONG_S)
        assert caught.value.retry_after_s > 0
        scheduler.submit(submissions(3, tokens=40), LONG_S).cancel()
        filling.cancel()
        last = scheduler.submit(submissions(4, tokens=100), LONG_S)
        engine.gate.set()
        await last.gather()
        await block
    assert engine.batches[1:] == [[4]]


async def test_a_request_that_never_fits_is_refused_for_good() -> None:
    async with scheduling(Engine(), queue_tokens=100) as scheduler:
        with pytest.raises(InvalidArgument, match="at most 100"):
            scheduler.submit(submissions(1, 2, tokens=51), LONG_S)


async def test_a_failed_entry_fails_its_request_alone() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        block = await blocked(engine, scheduler)
        bad = scheduler.submit(submissions(1, -1), LONG_S)
        good = scheduler.submit(submissions(5), LONG_S)
        engine.gate.set()
        with pytest.raises(NonFiniteOutput):
            await bad.gather()
        assert [outcome.result for outcome in await good.gather()] == [10]
        await block


async def test_an_engine_that_breaks_fails_its_batch_and_serves_on() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        engine.error = RuntimeError("out of memory")
        with pytest.raises(PpodError) as caught:
            await scheduler.submit(submissions(1), LONG_S).gather()
        assert caught.value.code is Internal.code
        assert caught.value.__cause__ is engine.error
        engine.error = None
        assert [outcome.result for outcome in await scheduler.submit(submissions(2), LONG_S).gather()] == [4]


@pytest.mark.parametrize(("number", "lost"), [(700, True), (719, True), (214, True), (2, False), (9, False)])
async def test_a_device_that_is_lost_ends_the_service_and_another_error_does_not(number: int, lost: bool) -> None:
    """CUDA's number: behind an illegal access all else fails, too, and only another process helps."""
    engine = Engine()
    engine.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of it")
    engine.error.error_code = number  # pyright: ignore
    with ThreadPoolExecutor(1) as executor:
        scheduler: Scheduler[int, int] = Scheduler(engine.run, BatchingConfig(), executor, ServiceMetrics())
        task = asyncio.create_task(scheduler.run())
        await asyncio.sleep(0)
        with pytest.raises(PpodError) as caught:
            await scheduler.submit(submissions(1), LONG_S).gather()
        assert caught.value.code is Internal.code
        if lost:
            with pytest.raises(ServiceBroken, match=r"for this process: CUDA error: an illegal memory access was .*d$"):
                await asyncio.wait_for(task, 10)
            with pytest.raises(Unavailable):
                scheduler.submit(submissions(2), LONG_S)
            return
        engine.error = None
        assert [outcome.result for outcome in await scheduler.submit(submissions(2), LONG_S).gather()] == [4]
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_an_engine_that_forgets_an_entry_is_an_error_and_no_hang() -> None:
    engine = Engine()
    engine.silent = True
    async with scheduling(engine) as scheduler:
        with pytest.raises(PpodError):
            await asyncio.wait_for(scheduler.submit(submissions(1), LONG_S).gather(), 5)


async def test_exclusive_jobs_run_between_two_batches() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        block = await blocked(engine, scheduler)
        waiting = scheduler.submit(submissions(1), LONG_S)
        job = asyncio.create_task(scheduler.exclusive(lambda: list(engine.batches)))
        await asyncio.sleep(0.02)
        assert not job.done()
        engine.gate.set()
        await waiting.gather()
        await block
        assert await job == [[999]]
    assert engine.batches == [[999], [1]]


async def test_the_event_loop_stays_free_while_the_model_runs() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        block = await blocked(engine, scheduler)
        await asyncio.wait_for(asyncio.sleep(0), 1)
        assert not block.done()
        engine.gate.set()
        await block


async def test_stopping_tells_those_who_wait() -> None:
    engine = Engine()
    async with scheduling(engine) as scheduler:
        await blocked(engine, scheduler)
        waiting = scheduler.submit(submissions(1), LONG_S)
    with pytest.raises(Unavailable):
        await waiting.gather()
    with pytest.raises(Unavailable):
        scheduler.submit(submissions(1), LONG_S)


async def test_batches_are_short_while_others_wait_and_whole_for_a_request_that_is_alone() -> None:
    """At 100 tokens a second and less, 0.3 s hold three sequences of 10 tokens at most."""
    engine = Engine()
    config = BatchingConfig(max_batch_tokens=1_000, max_wait_ms=0.0, max_batch_s=0.3)
    with ThreadPoolExecutor(1) as executor:
        scheduler: Scheduler[int, int] = Scheduler(engine.run, config, executor, ServiceMetrics())
        task = asyncio.create_task(scheduler.run())
        engine.gate.clear()
        slow = scheduler.submit(submissions(0, tokens=10), LONG_S)
        await asyncio.sleep(0.1)
        engine.gate.set()
        await slow.gather()
        await settled(executor)
        await scheduler.submit(submissions(*range(1, 21), tokens=10), LONG_S).gather()
        await settled(executor)
        engine.gate.clear()
        engine.entered.clear()
        first = scheduler.submit(submissions(0, tokens=10), LONG_S)
        # It takes 0.4 s from when it runs: on a busy machine its thread may be late.
        await asyncio.to_thread(engine.entered.wait, 10)
        await asyncio.sleep(0.4)
        both = [scheduler.submit(submissions(*range(10), tokens=10), LONG_S) for _ in range(2)]
        engine.gate.set()
        await asyncio.gather(first.gather(), *(ticket.gather() for ticket in both))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert engine.batches[1] == list(range(1, 21))
    assert len(engine.batches[3]) <= 3
