"""An open-loop load generator: sends requests at the times of a Poisson process, however slow the answers are.

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
from collections.abc import Sequence
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
VOCAB = 40_000


@dataclass(frozen=True)
class Stream:
    """One team's requests.

    Attributes:
        team: for the record.
        token: API token; empty: none is sent.
        requests_per_s: mean rate of the Poisson process.
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


@dataclass(frozen=True)
class Load:
    """What to send where, for how long."""

    target: str
    seconds: float
    streams: tuple[Stream, ...]

    @staticmethod
    def from_json(text: str) -> Load:
        values = json.loads(text)
        streams = tuple(Stream(**{**stream, "tokens": tuple(stream["tokens"])}) for stream in values["streams"])
        return Load(values["target"], values["seconds"], streams)

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
        due_s = draw.expovariate(stream.requests_per_s)
        tasks: set[asyncio.Task[None]] = set()
        while due_s < self._load.seconds:
            await asyncio.sleep(max(0.0, self._start_s + due_s - time.monotonic()))
            request, tokens = _request(stream, draw)
            if self._open < MAX_OPEN:
                self._open += 1
                task = asyncio.create_task(self._send(stream, stub, request, tokens, due_s, draw.random()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            due_s += draw.expovariate(stream.requests_per_s)
        await asyncio.gather(*tasks)

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


def _request(stream: Stream, draw: random.Random) -> tuple[reward_pb2.ScoreRequest, int]:
    lengths = [draw.randint(*stream.tokens) for _ in range(stream.sequences)]
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
