"""gRPC's asyncio server drops calls that reach it as it stops: it has taken them from the wire, but begun none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import pytest

from ppod import AsyncRewardClient, RewardClient, Unavailable
from ppod.client import NO_RETRY, Delivery
from support.scripted_services import scripted_server, token_score

CALLS = 8


class _Dropping:
    """An empty asyncio server whose event loop stands still while calls arrive, and which then stops."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        server = grpc.aio.server()
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._bound.set()
        self._stop.wait(30)  # on purpose in the event loop's own thread
        await server.stop(0.2)

    def __enter__(self) -> _Dropping:
        self._thread.start()
        assert self._bound.wait(10)
        return self

    def stop(self) -> None:
        """Let go of all calls; returns at once."""
        self._stop.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(10)


def _score_blocking(target: str) -> list[float]:
    with RewardClient(target, timeout_s=10) as client, ThreadPoolExecutor(CALLS) as pool:
        return list(pool.map(lambda token: float(client.score([[token]]).values[0]), range(1, CALLS + 1)))


def _score_awaited(target: str) -> list[float]:
    async def score() -> list[float]:
        async with AsyncRewardClient(target, timeout_s=10) as client:
            scores: list[Awaitable[float]] = [one(client, token) for token in range(1, CALLS + 1)]
            return await asyncio.gather(*scores)

    async def one(client: AsyncRewardClient, token: int) -> float:
        return float((await client.score([[token]])).values[0])

    return asyncio.run(score())


@pytest.mark.parametrize("score", [_score_blocking, _score_awaited])
def test_another_replica_answers(score: Callable[[str], list[float]]) -> None:
    with _Dropping() as dropping, scripted_server() as answering:
        threading.Timer(0.5, dropping.stop).start()
        values = score(f"{dropping.target},{answering.target}")
    assert values == [token_score([token]) + 2 for token in range(1, CALLS + 1)]


def test_without_another_the_error_says_what_happened() -> None:
    """With gRPC's own status as the cause: should it change one day, this test tells."""
    once = Delivery(retry=NO_RETRY)
    with (
        _Dropping() as dropping,
        RewardClient(dropping.target, timeout_s=10, delivery=once) as client,
        ThreadPoolExecutor(CALLS) as pool,
    ):
        calls = [pool.submit(client.score, [[token]]) for token in range(1, CALLS + 1)]
        time.sleep(0.5)
        dropping.stop()
        errors = [call.exception() for call in calls]
    assert all(isinstance(error, Unavailable) for error in errors)
    causes = [error.__cause__ for error in errors if error is not None]
    codes = {cause.code() for cause in causes if isinstance(cause, grpc.Call)}
    assert grpc.StatusCode.CANCELLED in codes
    said = [str(error) for error in errors if "stopped before it answered" in str(error)]
    assert said
    assert all(dropping.target in one for one in said)
