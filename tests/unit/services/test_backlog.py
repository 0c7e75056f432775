"""Work beside the models: a bounded backlog that no team fills alone, and places that go round fairly."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ppod.errors import InvalidArgument, ResourceExhausted
from ppod_services.core.callers import ANONYMOUS_CALLER, Caller, Priority, Team
from ppod_services.core.config import BatchingConfig
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.scheduler import Scheduler
from ppod_services.reward.backlog import Backlog, Turns
from ppod_services.reward.requests import run_batch
from ppod_services.reward.runtime import Runtime
from ppod_services.reward.samples import Sample, TextContent

A = Caller(Team("a", part=0.5))
B = Caller(Team("b", part=0.5))


def test_a_backlog_is_bounded_and_tells_a_wait_that_it_measured() -> None:
    backlog = Backlog("the judge", 10)
    with pytest.raises(InvalidArgument), backlog.hold(ANONYMOUS_CALLER, 11):
        pass
    with backlog.hold(ANONYMOUS_CALLER, 10):
        time.sleep(0.1)
        with pytest.raises(ResourceExhausted), backlog.hold(ANONYMOUS_CALLER, 1):
            pass
    with backlog.hold(ANONYMOUS_CALLER, 5), pytest.raises(ResourceExhausted) as caught:
        backlog.hold(ANONYMOUS_CALLER, 6).__enter__()
    # Ten texts took a tenth of a second, so five take half of that.
    assert 0.03 < caught.value.retry_after_s < 0.2


def test_a_team_that_fills_the_backlog_leaves_the_others_their_part() -> None:
    backlog = Backlog("the judge", 16)
    # Each team's own part is 4 of the first 8; the other 8 are whose they are first.
    with pytest.raises(InvalidArgument, match="at most 12"), backlog.hold(A, 13):
        pass
    with backlog.hold(A, 12):
        with pytest.raises(ResourceExhausted, match="12 texts wait, 12 of them of team a"), backlog.hold(A, 1):
            pass
        with backlog.hold(B, 4), pytest.raises(ResourceExhausted, match="16 texts wait, 4 of them of team b"):
            backlog.hold(B, 1).__enter__()


async def finishing_order(turns: Turns, *work: tuple[str, Caller, int]) -> list[str]:
    """The names of pieces of work, all of which come at once, in the order in which they have the only place."""
    order: list[str] = []

    async def run(name: str, caller: Caller, texts: int) -> None:
        async with turns.place(caller, texts):
            order.append(name)
            await asyncio.sleep(0)

    await asyncio.gather(*(run(*piece) for piece in work))
    return order


async def test_places_alternate_between_teams_however_much_one_of_them_sends() -> None:
    flood = [(f"a{number}", A, 1) for number in range(6)]
    assert await finishing_order(Turns(1), *flood, ("b0", B, 1), ("b1", B, 1)) == [
        *("a0", "a1", "b0", "a2", "b1"),  # a0 had the place before b was there
        *("a3", "a4", "a5"),
    ]


async def test_places_are_fair_by_texts_and_weights() -> None:
    heavy = Caller(Team("heavy", weight=2.0))
    work = [*((f"h{number}", heavy, 4) for number in range(4)), *((f"b{number}", B, 2) for number in range(3))]
    # After h0 both teams stand at 4 / 2 = 2; then each piece moves its team by two, and of equals the older goes first.
    assert await finishing_order(Turns(1), *work) == ["h0", "h1", "b0", "h2", "b1", "h3", "b2"]


async def test_priorities_order_the_work_of_a_team() -> None:
    urgent = Caller(A.team, Priority.HIGH)
    assert await finishing_order(Turns(1), ("a0", A, 1), ("a1", A, 1), ("high", urgent, 1)) == ["a0", "high", "a1"]


async def test_whoever_goes_away_gives_its_place_to_the_next() -> None:
    turns = Turns(1)
    await turns.take(A, 1)
    waiting = asyncio.create_task(turns.take(A, 1))
    next_one = asyncio.create_task(turns.take(B, 1))
    await asyncio.sleep(0)
    waiting.cancel()  # before its turn
    turns.give_back()
    await asyncio.wait_for(next_one, 1)
    assert waiting.cancelled()
    granted = asyncio.create_task(turns.take(A, 1))
    last = asyncio.create_task(turns.take(B, 1))
    await asyncio.sleep(0)
    turns.give_back()
    granted.cancel()  # after it was given the place, and before it could know
    await asyncio.wait_for(last, 1)
    assert granted.cancelled()
    # Exactly one place is left of the one: it is given to the next, and to nobody else.
    turns.give_back()
    await asyncio.wait_for(turns.take(A, 1), 1)
    late = asyncio.create_task(turns.take(B, 1))
    await asyncio.sleep(0)
    assert not late.done()
    late.cancel()


async def test_texts_are_tokenised_for_the_teams_in_turn() -> None:
    """One team's long texts come before no queue and no quota, so they must not hold up another team's short one."""
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []
    with ThreadPoolExecutor(1) as model, ThreadPoolExecutor(1) as tokenizing:
        scheduler = Scheduler(run_batch, BatchingConfig(), model, ServiceMetrics())
        runtime = Runtime(scheduler, tokenizing)

        def job(name: str) -> None:
            begun.set()
            assert go_on.wait(10)
            done.append(name)

        def tokenize(caller: Caller, text: str, name: str) -> asyncio.Task[None]:
            return asyncio.ensure_future(
                runtime.tokenize([Sample(0, TextContent("", text))], caller, lambda: job(name))
            )

        long = [tokenize(A, "x" * 1_000_000, f"a{number}") for number in range(4)]
        await asyncio.to_thread(begun.wait, 10)
        short = tokenize(B, "x", "b")
        await asyncio.sleep(0)
        # A caller that goes away leaves its place to the next.
        long.pop(1).cancel()
        go_on.set()
        await asyncio.gather(*long, short)
    # A team that comes has had as much as the others: theirs that were first go before it once.
    assert done == ["a0", "a2", "b", "a3"]
