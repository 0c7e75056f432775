"""Offers texts to a ppod reward service with the asyncio client, and times it.

usage: python grpc_load.py --target HOST:PORT --texts FILE --in-flight N --per-request N --seconds S --lone-calls N

Prints one JSON object: sequences a second, how much longer a lone call takes than its forward pass, and the scores in
the order of the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from pathlib import Path

import numpy as np
from lone import bare_forward, extra_seconds

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


def measure_lone(options: argparse.Namespace) -> dict[str, float]:
    """Calls with one sequence and nobody else there, with the synchronous client."""
    with RewardClient(options.target) as client, bare_forward(tuple(json.loads(options.bare))) as bare:
        tokens = np.asarray(bare.tokens, dtype=np.int32)
        return extra_seconds(lambda: client.score([tokens]).timing.compute_s, bare, options.lone_calls)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a load generator for gRPC."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--target", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--per-request", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--lone-calls", type=int, required=True)
    parser.add_argument("--bare", required=True, help="JSON list: command of bare.py --lone")
    return parser


def main() -> None:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    texts: list[str] = json.loads(options.texts.read_text())
    sequences_per_s, scores = asyncio.run(saturate(options, texts))
    lone = measure_lone(options)
    print(json.dumps({"sequences_per_s": sequences_per_s, "scores": scores, **lone}))


if __name__ == "__main__":
    main()
