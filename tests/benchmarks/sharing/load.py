"""An open-loop load generator: sends requests at random times, however slow the answers are.

The times are those of a Poisson process, given how many arrive in each five seconds: independent and uniform there. So
requests come in bursts as callers' do, and yet a minute brings the load that was asked for, not one that chance made.

Runs in a process of its own, so that it shares no interpreter with what it measures. Reads a `Load` as JSON from
stdin, and writes one JSON line for each request to the file named on the command line. Bounded in time and in the
number of requests that are open at once; goes to 127.0.0.1 only.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from ppod.channel import client_options
from ppod.errors import ResourceExhausted, from_rpc_error
from ppod.tensors import pack_sequences
from ppod.v1 import reward_pb2, reward_pb2_grpc

MAX_OPEN = 20_000
BLOCK_S = 5.0
VOCAB = 40_000


@dataclass(frozen=True)
class Stream:
    """One team's requests.

    Attributes:
        team: for the record.
        token: API token; empty: none is sent.
        requests_per_s: mean rate.
        share: where given, the mean rate follows the server: from the third block on it is this part of the tokens that
            the model processed, for whomever, in the two blocks before.
        times: where given, when to send each request, from the start of the load; the rate counts for nothing then.
        sequences: sequences of each request.
        tokens: shortest and longest sequence.
        deadline_s: of each attempt.
        obeys: part of the refused requests that come back once, after the time told, if that is within `patience_s`.
        patience_s: longest wait that such a caller accepts.
        seed: decides arrival times and lengths.
    """

    team: str
    token: str
    requests_per_s: float
    sequences: int
    tokens: tuple[int, int]
    deadline_s: float
    obeys: float = 0.0
    patience_s: float = 20.0
    seed: int = 0
    share: float | None = None
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Load:
    """What to send where, for how long; `metrics_url` tells what the server did, for streams that follow it."""

    target: str
    seconds: float
    streams: tuple[Stream, ...]
    metrics_url: str = ""

    @staticmethod
    def from_json(text: str) -> Load:
        values = json.loads(text)
        streams = tuple(
            Stream(**{**stream, "tokens": tuple(stream["tokens"]), "times": tuple(stream["times"])})
            for stream in values["streams"]
        )
        return Load(values["target"], values["seconds"], streams, values["metrics_url"])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Call:
    """One attempt: when it was due, seconds to its answer, what it was told.

    Attributes:
        due_s: when it was to be sent, from the start of the load.
        seconds: from then to the answer, so that a late generator shows as latency.
        retry_after_s: what a refusal told; None else.
        attempt: 0 for the first, 1 for one that obeyed a refusal.
    """

    team: str
    due_s: float
    seconds: float
    tokens: int
    code: str
    retry_after_s: float | None
    attempt: int


class Generator:
    """Sends the requests of one load."""

    def __init__(self, load: Load) -> None:
        if not load.target.startswith("127.0.0.1:"):
            raise SystemExit("this generator loads servers on 127.0.0.1 only")
        self._load = load
        self._calls: list[Call] = []
        self._served: list[tuple[float, float]] = []
        self._open = 0
        self._start_s = 0.0

    async def run(self) -> list[Call]:
        async with grpc.aio.insecure_channel(self._load.target, options=client_options()) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            self._start_s = time.monotonic()
            await asyncio.gather(*(self._stream(stream, stub) for stream in self._load.streams))
        return self._calls

    async def _stream(self, stream: Stream, stub: reward_pb2_grpc.RewardServiceAsyncStub) -> None:
        draw = random.Random(stream.seed)
        lengths = _lengths(stream, draw)
        tasks: set[asyncio.Task[None]] = set()
        for due_s in stream.times or self._arrivals(stream, random.Random(stream.seed + 1)):
            await asyncio.sleep(max(0.0, self._start_s + due_s - time.monotonic()))
            request, tokens = _request(next(lengths), draw)
            if self._open < MAX_OPEN:
                self._open += 1
                task = asyncio.create_task(self._send(stream, stub, request, tokens, due_s, draw.random()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    def _arrivals(self, stream: Stream, draw: random.Random) -> Iterator[float]:
        """Times of requests in order: in each block as many as the rate asks for, at random within it."""
        wanted, sent, start_s = 0.0, 0, 0.0
        while start_s < self._load.seconds:
            end_s = min(start_s + BLOCK_S, self._load.seconds)
            wanted += self._rate(stream, start_s) * (end_s - start_s)
            count = round(wanted) - sent
            yield from sorted(draw.uniform(start_s, end_s) for _ in range(count))
            sent, start_s = sent + count, end_s

    def _rate(self, stream: Stream, start_s: float) -> float:
        """Requests a second in the block that begins now."""
        if stream.share is None:
            return stream.requests_per_s
        self._served.append((time.monotonic(), served_tokens(self._load.metrics_url)))
        if start_s < 2 * BLOCK_S:
            return stream.requests_per_s
        (then_s, before), (now_s, now) = self._served[-3], self._served[-1]
        return stream.share * (now - before) / (now_s - then_s) / (stream.sequences * sum(stream.tokens) / 2)

    async def _send(
        self,
        stream: Stream,
        stub: reward_pb2_grpc.RewardServiceAsyncStub,
        request: reward_pb2.ScoreRequest,
        tokens: int,
        due_s: float,
        chance: float,
    ) -> None:
        try:
            first = await self._attempt(stream, stub, request, tokens, due_s, 0)
            waits = first.retry_after_s is not None and first.retry_after_s <= stream.patience_s
            if first.retry_after_s is not None and waits and chance < stream.obeys:
                await asyncio.sleep(first.retry_after_s)
                await self._attempt(stream, stub, request, tokens, time.monotonic() - self._start_s, 1)
        finally:
            self._open -= 1

    async def _attempt(
        self,
        stream: Stream,
        stub: reward_pb2_grpc.RewardServiceAsyncStub,
        request: reward_pb2.ScoreRequest,
        tokens: int,
        due_s: float,
        attempt: int,
    ) -> Call:
        metadata = (("authorization", f"Bearer {stream.token}"),) if stream.token else ()
        code, retry_after_s = "OK", None
        try:
            await stub.Score(request, timeout=stream.deadline_s, metadata=metadata)
        except grpc.RpcError as error:
            typed = from_rpc_error(error)
            code = typed.code.name
            retry_after_s = typed.retry_after_s if isinstance(typed, ResourceExhausted) else None
        seconds = time.monotonic() - self._start_s - due_s
        call = Call(stream.team, due_s, seconds, tokens, code, retry_after_s, attempt)
        self._calls.append(call)
        return call


def served_tokens(metrics_url: str) -> float:
    """Tokens that the model has processed, of all teams."""
    with urllib.request.urlopen(metrics_url, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("ppod_team_served_tokens_total{"))


def _lengths(stream: Stream, draw: random.Random) -> Iterator[list[int]]:
    """Lengths of each request's sequences: random, but every second request makes up for the one before."""
    shortest, longest = stream.tokens
    while True:
        lengths = [draw.randint(shortest, longest) for _ in range(stream.sequences)]
        yield lengths
        yield [shortest + longest - length for length in lengths]


def _request(lengths: list[int], draw: random.Random) -> tuple[reward_pb2.ScoreRequest, int]:
    ids = np.random.default_rng(draw.getrandbits(32))
    sequences: Sequence[np.ndarray] = [ids.integers(100, VOCAB, length, dtype=np.int32) for length in lengths]
    request = reward_pb2.ScoreRequest(request_id=f"{draw.getrandbits(64):016x}", tokens=pack_sequences(sequences))
    return request, sum(lengths)


def main() -> None:
    load = Load.from_json(sys.stdin.read())
    calls = asyncio.run(Generator(load).run())
    Path(sys.argv[1]).write_text("".join(json.dumps(asdict(call)) + "\n" for call in calls))


if __name__ == "__main__":
    main()
