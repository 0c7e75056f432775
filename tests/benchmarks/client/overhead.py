"""What the client adds to a lone call: p50 of a bare stub, of RewardClient and of AsyncRewardClient, in turns.

    PYTHONPATH=protos:services:tests python -m benchmarks.client.overhead --rounds 20 --calls 200

All three call one real service with a tiny model, in one process, and take turns so that the machine's mood is shared.
Exits with 1 when the blocking face costs more than 0.2 ms beyond the asyncio one.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import grpc

from benchmarks.fuzz.malformed import start_services
from ppod import AsyncRewardClient, RewardClient
from ppod.tensors import pack_sequences
from ppod.v1 import reward_pb2, reward_pb2_grpc

TOKENS = [list(range(40))]
BOUND_S = 2e-4


def blocking_seconds(call: Callable[[], object], calls: int) -> list[float]:
    """Seconds of each of so many calls."""
    seconds: list[float] = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


async def awaited_seconds(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    """Seconds of each of so many awaited calls."""
    seconds: list[float] = []
    for _ in range(calls):
        start = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(target: str, rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of a call, by how it was made."""
    found: dict[str, list[float]] = {"bare stub": [], "RewardClient": [], "AsyncRewardClient": []}

    async def awaited(count: int) -> list[float]:
        async with AsyncRewardClient(target) as client:
            await client.score(TOKENS)
            return await awaited_seconds(lambda: client.score(TOKENS), count)

    with grpc.insecure_channel(target) as channel, RewardClient(target) as client:
        stub = reward_pb2_grpc.RewardServiceStub(channel)

        def bare() -> None:
            stub.Score(reward_pb2.ScoreRequest(tokens=pack_sequences(TOKENS)), timeout=10)

        bare()
        client.score(TOKENS)
        for _ in range(rounds):
            found["bare stub"] += blocking_seconds(bare, calls)
            found["RewardClient"] += blocking_seconds(lambda: client.score(TOKENS), calls)
            found["AsyncRewardClient"] += asyncio.run(awaited(calls))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> int:
    """Start the service, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppod-overhead-")))
        reward, _ = start_services(stack, directory)
        medians = measure(reward.target, arguments.rounds, arguments.calls)
    for name, seconds in medians.items():
        print(f"{name:<18} p50 {seconds * 1e3:.3f} ms, {(seconds - medians['bare stub']) * 1e3:+.3f} ms")
    return 1 if medians["RewardClient"] - medians["AsyncRewardClient"] > BOUND_S else 0


if __name__ == "__main__":
    sys.exit(main())
