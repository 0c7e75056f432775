"""Offers texts to an HTTP reward server and times it; runs in the peers' environment.

usage: python http_load.py --protocol openrlhf|litserve|vllm --url URL --texts FILE --in-flight N --per-request N
    --seconds S --lone-calls N

Prints one JSON object: sequences a second, how much longer a lone call takes than its forward pass, and the scores in
the order of the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from lone import bare_forward, extra_seconds
from saturation import saturate


@dataclass(frozen=True)
class Protocol:
    """How a server is asked, and how its reply gives the scores."""

    path: str
    body: Callable[[list[str]], dict[str, Any]]
    scores: Callable[[dict[str, Any]], list[float]]


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability)) if 0 < probability < 1 else math.nan


PROTOCOLS = {
    "openrlhf": Protocol("/get_reward", lambda texts: {"query": texts}, lambda reply: reply["rewards"]),
    "litserve": Protocol("/predict", lambda texts: {"text": texts[0]}, lambda reply: [reply["score"]]),
    "vllm": Protocol(
        "/classify",
        lambda texts: {"model": "reward", "input": texts, "add_special_tokens": False, "use_activation": False},
        lambda reply: [row["probs"][0] for row in sorted(reply["data"], key=lambda row: row["index"])],
    ),
}


class Load:
    """One server under load."""

    def __init__(self, session: aiohttp.ClientSession, url: str, protocol: Protocol) -> None:
        self._session = session
        self._url = url + protocol.path
        self._protocol = protocol

    async def call(self, texts: list[str]) -> list[float]:
        """Scores of the texts of one request."""
        async with self._session.post(self._url, json=self._protocol.body(texts)) as reply:
            if reply.status != 200:
                raise RuntimeError(f"{self._url}: {reply.status} {await reply.text()}")
            return self._protocol.scores(await reply.json())


async def measure(options: argparse.Namespace) -> dict[str, object]:
    """Warm up, saturate, then call alone."""
    texts: list[str] = json.loads(options.texts.read_text())
    connector = aiohttp.TCPConnector(limit=options.in_flight)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(session, options.url, PROTOCOLS[options.protocol])
        sequences_per_s, scores = await saturate(
            load.call, texts, options.per_request, options.in_flight, options.seconds
        )
        lone = await asyncio.to_thread(measure_lone, options, min(texts, key=len), asyncio.get_running_loop(), load)
    return {
        "sequences_per_s": sequences_per_s,
        "scores": scores,
        **lone,
    }


def measure_lone(
    options: argparse.Namespace, text: str, loop: asyncio.AbstractEventLoop, load: Load
) -> dict[str, float]:
    """Calls with one text and nobody else there; runs beside the loop that carries them."""
    with bare_forward(tuple(json.loads(options.bare))) as bare:
        return extra_seconds(
            lambda: void(asyncio.run_coroutine_threadsafe(load.call([text]), loop).result()), bare, options.lone_calls
        )


def void(_: object) -> None:
    """These servers do not tell what the model took."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--per-request", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--lone-calls", type=int, required=True)
    parser.add_argument("--bare", required=True, help="JSON list: command of bare.py --lone")
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
