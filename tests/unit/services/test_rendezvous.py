"""Where the models of one request meet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from ppod.errors import Cancelled, PpodError, ResourceExhausted
from ppod_services.core.tickets import Outcome, Submission
from ppod_services.reward.rendezvous import Rendezvous


def of(*items: int) -> list[Submission[int]]:
    return [Submission(item, 1) for item in items]


async def doubled(submissions: Sequence[Submission[int]]) -> list[Outcome[int]]:
    await asyncio.sleep(0)
    return [Outcome(index, 2 * one.item, 1, 0.0, 0.0) for index, one in enumerate(submissions)]


async def refused(_: Sequence[Submission[int]]) -> list[Outcome[int]]:
    raise ResourceExhausted("full", 1.0)


async def test_each_gets_the_outcomes_of_its_own() -> None:
    rendezvous: Rendezvous[int, int] = Rendezvous(3)
    parts = await asyncio.gather(*(rendezvous.run(of(*items), doubled) for items in ((1, 2), (3,), (4, 5))))
    assert [[outcome.result for outcome in part] for part in parts] == [[2, 4], [6], [8, 10]]


async def test_nobody_enters_before_all_are_here() -> None:
    rendezvous: Rendezvous[int, int] = Rendezvous(2)
    early = asyncio.ensure_future(rendezvous.run(of(1), doubled))
    await asyncio.sleep(0.02)
    assert not early.done()
    await rendezvous.run(of(2), doubled)
    assert (await early)[0].result == 2


async def test_a_refusal_is_everybodys() -> None:
    rendezvous: Rendezvous[int, int] = Rendezvous(2)
    found = await asyncio.gather(*(rendezvous.run(of(1), refused) for _ in range(2)), return_exceptions=True)
    assert [type(error) for error in found] == [ResourceExhausted] * 2


async def test_nobody_waits_for_one_who_was_cancelled() -> None:
    rendezvous: Rendezvous[int, int] = Rendezvous(2)
    early = asyncio.ensure_future(rendezvous.run(of(1), doubled))
    await asyncio.sleep(0)

    async def never(_: Sequence[Submission[int]]) -> list[Outcome[int]]:
        await asyncio.sleep(60)
        raise AssertionError

    last = asyncio.ensure_future(rendezvous.run(of(2), never))
    await asyncio.sleep(0)
    last.cancel()
    with pytest.raises(Cancelled) as caught:
        await early
    assert isinstance(caught.value, PpodError)
