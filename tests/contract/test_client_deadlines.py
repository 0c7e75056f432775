"""How long a call may take, and a name that no lookup takes."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import pytest
from google.protobuf.message import Message

from ppod import AsyncRewardClient, DeadlineExceeded, Delivery, HedgePolicy, InvalidArgument, RewardClient, Unavailable
from ppod.v1 import reward_pb2
from support.scripted_services import Script, scripted_server

Ask = Callable[[str, float], float]
HEDGED = Delivery(hedge=HedgePolicy(delay_s=30.0))
"""So that the client waits for a time, too, and not for a reply alone."""


def ask_blocking(target: str, timeout_s: float) -> float:
    with RewardClient(target, delivery=HEDGED) as client:
        return float(client.score([[1, 2]], timeout_s=timeout_s).values[0])


def ask_awaited(target: str, timeout_s: float) -> float:
    async def call() -> float:
        async with AsyncRewardClient(target, delivery=HEDGED) as client:
            return float((await client.score([[1, 2]], timeout_s=timeout_s)).values[0])

    return asyncio.run(call())


both_faces = pytest.mark.parametrize("ask", [ask_blocking, ask_awaited])


@both_faces
@pytest.mark.parametrize("timeout_s", [1e10, 1e30, math.inf])
def test_a_deadline_that_never_comes_has_not_passed(ask: Ask, timeout_s: float) -> None:
    with scripted_server() as server:
        assert ask(server.target, timeout_s) == 7.5


@both_faces
def test_a_timeout_that_is_no_number_is_refused(ask: Ask) -> None:
    with scripted_server() as server, pytest.raises(InvalidArgument) as caught:
        ask(server.target, math.nan)
    assert str(caught.value) == "timeout_s: found nan, expected seconds"


def test_asking_for_the_servers_limit_is_a_part_of_the_call() -> None:
    release = threading.Event()

    def change(reply: Message, _: int) -> None:
        if isinstance(reply, reward_pb2.ScoreResponse):
            release.wait(0.6)
            raise InvalidArgument("tokens", "3 sequences", "1 to 2 sequences")
        release.wait(10)

    with scripted_server(Script(change)) as server, RewardClient(server.target, timeout_s=1.0) as client:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.score([[1], [2], [3]])
        assert 0.9 < time.monotonic() - start < 1.4
        release.set()


@both_faces
@pytest.mark.parametrize("host", ["reward..ppod", "x" * 64])
def test_a_name_that_cannot_be_one_has_no_replicas(ask: Ask, host: str) -> None:
    with pytest.raises(Unavailable):
        ask(f"dns:///{host}:50051", 0.5)
