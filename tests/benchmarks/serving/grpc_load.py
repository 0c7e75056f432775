"""Offers texts to a ppod reward service with the asyncio client, and times it.

usage: python grpc_load.py --target HOST:PORT --texts FILE --in-flight N --per-request N --seconds S --lone-calls N

Prints one JSON object: sequences a second, p50 of a lone call, scores in the order of the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import time
from pathlib import Path

from ppod import AsyncRewardClient, RewardClient


async def score_all(client: AsyncRewardClient, texts: list[str], per_request: int, in_flight: int) -> list[float]:
    """Scores of all texts, so many requests at a time."""
    scores = [math.nan] * len(texts)
    starts = iter(range(0, len(texts), per_request))

    async def worker() -> None:
        for start in starts:
            part = slice(start, start + per_request)
            scores[part] = (await client.score_texts(texts[part], timeout_s=600)).values.tolist()

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return scores


async def saturate(options: argparse.Namespace, texts: list[str]) -> tuple[float, list[float]]:
    """Sequences a second, and the scores."""
    async with AsyncRewardClient(options.target) as client:
        scores = await score_all(client, texts, options.per_request, options.in_flight)
        passes, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < options.seconds:
            await score_all(client, texts, options.per_request, options.in_flight)
            passes += 1
    return passes * len(texts) / seconds, scores


def lone_p50_s(target: str, text: str, calls: int) -> float:
    """Median seconds of a call with one text and nobody else there, with the synchronous client."""
    times: list[float] = []
    with RewardClient(target) as client:
        for _ in range(calls):
            start = time.perf_counter()
            client.score_texts([text])
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--per-request", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--lone-calls", type=int, required=True)
    options = parser.parse_args()
    texts: list[str] = json.loads(options.texts.read_text())
    sequences_per_s, scores = asyncio.run(saturate(options, texts))
    lone = lone_p50_s(options.target, texts[len(texts) // 2], options.lone_calls)
    print(json.dumps({"sequences_per_s": sequences_per_s, "lone_p50_s": lone, "scores": scores}))


if __name__ == "__main__":
    main()
