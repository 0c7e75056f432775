"""Replicas without a network: an exchange is driven against a clock that jumps from event to event."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ppod.client.delivery import Delivery
from ppod.client.exchange import Action, Exchange, Send, Shared
from ppod.client.identity import ModelState
from ppod.client.jobs import Answerer
from ppod.client.latencies import HedgeBudget, Latencies
from ppod.client.replicas import Replicas
from ppod.client.splitting import RowSizes, split_rows
from ppod.errors import DeadlineExceeded, PpodError

Answer = tuple[float, bytes | PpodError]
"""Seconds until the answer, and the answer."""

Behaviour = Callable[[bytes, float], Answer]
"""What a replica makes of a payload that arrives at a time."""


class RowsJob:
    """Asks for its rows; a good reply to rows 3 to 5 is b"3-5" and b"@" and a weight version."""

    method = "/test/Rows"

    def __init__(self, tokens: list[int], *, repeatable: bool = True) -> None:
        self.sizes = RowSizes(tokens, [4 * each for each in tokens])
        self.repeatable = repeatable
        self.rows: dict[int, range] = {}

    def encode(self, rows: range, part: int | None) -> bytes:
        del part
        return f"{rows.start}-{rows.stop}".encode()

    def accept(self, rows: range, data: bytes) -> Answerer:
        which, _, version = data.decode().partition("@")
        assert which == f"{rows.start}-{rows.stop}"
        self.rows[rows.start] = rows
        return Answerer(ModelState("model", int(version), "tok"), (int(version),))

    def covered(self) -> list[int]:
        return [row for start in sorted(self.rows) for row in self.rows[start]]


def good(seconds: float, version: int = 0) -> Behaviour:
    return lambda payload, _: (seconds, payload + f"@{version}".encode())


def failing(error: PpodError, seconds: float = 0.001) -> Behaviour:
    return lambda _, __: (seconds, error)


@dataclass
class Sent:
    at: float
    address: str
    payload: bytes


@dataclass
class World:
    """Replicas by address, and what was sent to them."""

    replicas: dict[str, Behaviour]
    delivery: Delivery = field(default_factory=Delivery)
    seed: int = 0
    now: float = 0.0
    sent: list[Sent] = field(default_factory=list[Sent])
    cancelled: int = 0

    def __post_init__(self) -> None:
        hedge = self.delivery.hedge
        self.shared = Shared(
            Replicas(list(self.replicas)),
            self.delivery,
            Latencies(),
            None if hedge is None else HedgeBudget(hedge.max_extra_fraction),
            random.Random(self.seed),
        )

    def addresses(self) -> list[str]:
        return [each.address for each in self.sent]

    def exchange(self, job: RowsJob, timeout_s: float = 10.0, max_sequences: int | None = None) -> None:
        """Run one exchange to its end; raises its error."""
        parts = split_rows(job.sizes, len(self.replicas), max_sequences, self.delivery.split)
        exchange = Exchange(job, parts, self.shared, self.now + timeout_s)
        deadline = self.now + timeout_s
        order = itertools.count()
        events: list[tuple[float, int, int, bytes | PpodError]] = []
        dropped: set[int] = set()

        def perform(actions: list[Action]) -> None:
            for action in actions:
                if isinstance(action, Send):
                    assert abs(action.timeout_s - (deadline - self.now)) < 1e-9
                    self.sent.append(Sent(self.now, action.address, action.payload))
                    seconds, answer = self.replicas[action.address](action.payload, self.now)
                    if seconds > action.timeout_s:
                        seconds, answer = action.timeout_s, DeadlineExceeded("the server's answer came too late")
                    heapq.heappush(events, (self.now + seconds, next(order), action.attempt, answer))
                else:
                    self.cancelled += 1
                    dropped.add(action.attempt)

        perform(exchange.start(self.now))
        while not exchange.done:
            wake = exchange.wake_at
            if wake is not None and (not events or wake <= events[0][0]):
                self.now = max(self.now, wake)
                perform(exchange.woke(self.now))
                continue
            assert events, "the exchange waits for nothing"
            self.now, _, attempt, answer = heapq.heappop(events)
            if attempt in dropped:
                continue
            if isinstance(answer, PpodError):
                perform(exchange.failed(attempt, answer, self.now))
            else:
                perform(exchange.arrived(attempt, answer, self.now))
        assert exchange.live_attempts == 0
        assert all(replica_tokens == 0 for replica_tokens in self.shared.replicas.outstanding().values())
        if exchange.error is not None:
            raise exchange.error
