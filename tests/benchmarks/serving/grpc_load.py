"""Offers texts to a ppod reward service with the asyncio client, and times it.

usage: python grpc_load.py --target HOST:PORT --texts FILE --in-flight N --per-request N --seconds S --lone-calls N

Prints one JSON object: sequences a second, how much longer a lone call takes than its forward pass, and the scores in
the order of the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import numpy as np
from lone import bare_forward, extra_seconds
from saturation import saturate

from ppod import AsyncRewardClient, RewardClient


async def measure_saturated(options: argparse.Namespace, texts: list[str]) -> tuple[float, list[float]]:
    """Sequences a second, and the scores."""
    async with AsyncRewardClient(options.target) as client:

        async def call(part: list[str]) -> list[float]:
            return (await client.score_texts(part, timeout_s=600)).values.tolist()

        return await saturate(call, texts, options.per_request, options.in_flight, options.seconds)


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
    sequences_per_s, scores = asyncio.run(measure_saturated(options, texts))
    lone = measure_lone(options)
    print(json.dumps({"sequences_per_s": sequences_per_s, "scores": scores, **lone}))


if __name__ == "__main__":
    main()
