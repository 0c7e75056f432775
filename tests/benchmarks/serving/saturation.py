"""Texts offered to a server without a pause, as many requests at a time as it is said."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable

Call = Callable[[list[str]], Awaitable[list[float]]]


async def saturate(
    call: Call, texts: list[str], per_request: int, in_flight: int, seconds: float
) -> tuple[float, list[float]]:
    """Score all texts once, which warms the server up, then go round them for `seconds`.

    Every request that was begun is waited for, and its time counts: a server that works in large batches must not gain
    or lose by where the last one falls.

    Returns:
        Sequences a second, and the scores in the order of the texts.
    """
    scores = [math.nan] * len(texts)
    parts = [slice(start, start + per_request) for start in range(0, len(texts), per_request)]
    once = iter(parts)

    async def score_rest() -> None:
        for part in once:
            scores[part] = await call(texts[part])

    await asyncio.gather(*(score_rest() for _ in range(in_flight)))
    endless = itertools.cycle(parts)
    done, start = 0, time.perf_counter()

    async def go_round() -> None:
        nonlocal done
        while time.perf_counter() - start < seconds:
            # Not in one line: `done` would be read before the wait, and what others add meanwhile be lost.
            scored = len(await call(texts[next(endless)]))
            done += scored

    await asyncio.gather(*(go_round() for _ in range(in_flight)))
    return done / (time.perf_counter() - start), scores
