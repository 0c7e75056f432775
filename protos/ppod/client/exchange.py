"""One request on its way through retries, hedges, parts and replicas, as a state machine without any I/O.

A driver performs the actions that it returns and tells it what became of them; the clock is an argument. So the
synchronous and the asyncio client share every decision, and tests need neither a network nor a sleep.
"""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass, field, replace

from ppod.client.delivery import Delivery
from ppod.client.jobs import Answerer, Job
from ppod.client.latencies import HedgeBudget, Latencies
from ppod.client.replicas import Replicas
from ppod.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NonFiniteOutput,
    PpodError,
    ResourceExhausted,
    RewardFailed,
    Unavailable,
)

_MAX_REASKS = 2
_MIN_HEDGE_S = 0.002
_MIN_STRAGGLE_S = 0.05
"""Parts that take a millisecond are three times as slow by chance alone."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; then call `arrived` or `failed` with the attempt's number."""

    attempt: int
    address: str
    method: str
    payload: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """End an attempt; nothing needs to be told about it any more."""

    attempt: int


Action = Send | Cancel


@dataclass(slots=True)
class Shared:
    """What all exchanges of a client share."""

    replicas: Replicas
    delivery: Delivery
    latencies: Latencies
    budget: HedgeBudget | None
    rng: random.Random


@dataclass(slots=True, eq=False)
class _Part:
    rows: range
    payload: bytes
    tokens: int
    live: dict[int, str] = field(default_factory=dict[int, str])
    sent_at: float = 0.0
    not_before: float = 0.0
    failures: int = 0
    tried: set[str] = field(default_factory=set[str])
    refusals: int = 0
    hedge_decided: bool = False
    sent_again: bool = False
    answerer: Answerer | None = None
    seconds: float = 0.0
    reasks: int = 0

    @property
    def waiting(self) -> bool:
        return self.answerer is None and not self.live


class Exchange:
    """Delivers one job. Not thread-safe; what it shares with others is.

    Args:
        job: what is asked.
        parts: how its rows are cut.
        shared: of the client.
        deadline: on the driver's clock, for everything: attempts, waits and all.
    """

    def __init__(self, job: Job, parts: list[range], shared: Shared, deadline: float) -> None:
        self.deadline = deadline
        self.done = False
        self.error: PpodError | None = None
        self.wake_at: float | None = None
        self._job = job
        self._shared = shared
        self._numbers = itertools.count()
        self._attempts: dict[int, tuple[_Part, str]] = {}
        self._held: dict[str, float] = {}
        self._answers: dict[str, Answerer] = {}
        lone = len(parts) == 1
        self._parts = [
            _Part(rows, job.encode(rows, None if lone else index), job.sizes.total_tokens(rows))
            for index, rows in enumerate(parts)
        ]

    @property
    def live_attempts(self) -> int:
        """Attempts under way."""
        return len(self._attempts)

    def start(self, now: float) -> list[Action]:
        """Begin."""
        return self._advance(now)

    def woke(self, now: float) -> list[Action]:
        """`wake_at` has come."""
        return self._advance(now)

    def arrived(self, attempt: int, data: bytes, now: float) -> list[Action]:
        """A reply came."""
        if attempt not in self._attempts or self.done:
            return []
        part, address = self._end(attempt)
        self._shared.replicas.mark_up(address)
        try:
            part.answerer = self._job.accept(part.rows, data)
        except PpodError as error:
            return self._finish(_rebased(error, part.rows.start))
        part.seconds = now - part.sent_at
        self._answers[address] = part.answerer
        self._shared.latencies.add(part.tokens, part.seconds)
        losers: list[Action] = [Cancel(other) for other in part.live]
        for other in list(part.live):
            self._end(other)
        if all(each.answerer is not None for each in self._parts):
            self._reconcile()
        return losers + self._advance(now)

    def failed(self, attempt: int, error: PpodError, now: float) -> list[Action]:
        """An attempt ended with an error."""
        if attempt not in self._attempts or self.done:
            return []
        part, address = self._end(attempt)
        if isinstance(error, Unavailable):
            self._shared.replicas.mark_down(address, now)
        if isinstance(error, DeadlineExceeded):
            self._shared.replicas.mark_late(address, now, now - part.sent_at)
            self._mark_late(now)
        if not self._may_repeat(error, address):
            return self._finish(_rebased(error, part.rows.start))
        part.tried.add(address)
        if isinstance(error, ResourceExhausted):
            self._held[address] = max(self._held.get(address, 0.0), now + error.retry_after_s)
            part.refusals += 1
        if part.live:
            return self._advance(now)
        # One other replica is asked at once after a refusal, and all others after a failure: refusals mean load.
        elsewhere = part.refusals < 2 and self._shared.replicas.has_other(part.tried | self._holding(now))
        if not elsewhere and not self._schedule_retry(part, error, now):
            return self._finish(_rebased(error, part.rows.start))
        return self._advance(now)

    def cancel(self) -> list[Action]:
        """The caller gives up: end every attempt."""
        self.done = True
        cancels: list[Action] = [Cancel(attempt) for attempt in self._attempts]
        for attempt in list(self._attempts):
            self._end(attempt)
        return cancels

    def _may_repeat(self, error: PpodError, address: str) -> bool:
        match error:
            case Unavailable():
                # The server may have done the work before the connection broke.
                return self._job.repeatable
            case ResourceExhausted():
                # gRPC's own, as for too large a message, brings no wait, and no wait mends it.
                return error.retry_after_s > 0
            case FailedPrecondition(what="weight_version"):
                # Another replica may have been updated already, or not yet.
                return self._shared.replicas.has_other({address, *self._stale_for(error)})
            case _:
                return False

    def _stale_for(self, error: FailedPrecondition) -> set[str]:
        """Replicas that this request was refused by, or that are known not to have the version asked for."""
        refused = {a for part in self._parts for a in part.tried}
        return refused | {a for a, who in self._answers.items() if str(who.state.weight_version) != error.expected}

    def _schedule_retry(self, part: _Part, error: PpodError, now: float) -> bool:
        """Set when the part is sent next; False where no more attempt is allowed or none would be in time."""
        retry = self._shared.delivery.retry
        part.failures += 1
        if part.failures >= retry.max_attempts or isinstance(error, FailedPrecondition):
            return False
        part.not_before = now + retry.backoff_s(part.failures, self._shared.rng)
        if isinstance(error, ResourceExhausted):
            # The told wait, then jitter: all refused callers are told about the same time.
            part.not_before += max(0.0, min(self._held.values()) - now)
        part.tried.clear()
        part.refusals = 0
        return part.not_before < self.deadline

    def _holding(self, now: float) -> set[str]:
        return {address for address, until in self._held.items() if until > now}

    def _advance(self, now: float) -> list[Action]:
        """Send what can be sent, and work out when to look again."""
        actions: list[Action] = []
        if self.done:
            return actions
        if now >= self.deadline:
            self._mark_late(now)
            return self._finish(DeadlineExceeded("the deadline passed before the request could be sent"))
        self.wake_at = None
        in_flight = self._shared.delivery.split.parts_in_flight
        for part in self._parts:
            if not part.waiting:
                continue
            if part.not_before > now:
                self._wake(part.not_before)
                continue
            held = self._holding(now)
            counts = [address for _, address in self._attempts.values()]
            full = {address for address in counts if counts.count(address) >= in_flight} | held
            address = self._shared.replicas.pick(self._avoided(part), full, part.tokens)
            held_until = min((until for until in self._held.values() if until > now), default=now)
            if address is None and held_until >= self.deadline:
                # No use waiting for them: whoever was down may be back by now.
                address = self._shared.replicas.pick(self._avoided(part) | held, full, part.tokens)
            if address is not None:
                actions.append(self._send(part, address, now))
            elif held:
                self._wake(held_until)
            elif not counts:
                gone = Unavailable("no replica is left that could answer this request")
                # Of a name that has no replica now, as between two pods, there may soon be one.
                if len(self._shared.replicas) or not self._schedule_retry(part, gone, now):
                    return self._finish(gone)
                self._wake(part.not_before)
        actions += self._send_again(now)
        return actions

    def _avoided(self, part: _Part) -> set[str]:
        newest = self._newest() if part.reasks else None
        stale = {a for a, who in self._answers.items() if newest is not None and who.versions != newest.versions}
        return part.tried | stale

    def _send(self, part: _Part, address: str, now: float) -> Send:
        number = next(self._numbers)
        if not part.live:
            part.sent_at = now
            part.hedge_decided = part.sent_again = False
            if self._shared.budget is not None:
                self._shared.budget.earn()
        part.live[number] = address
        self._attempts[number] = (part, address)
        return Send(number, address, self._job.method, part.payload, self.deadline - now)

    def _send_again(self, now: float) -> list[Action]:
        """Hedge late parts, and send stragglers to idle replicas."""
        actions: list[Action] = []
        if not self._job.repeatable or len(self._shared.replicas) < 2:
            return actions
        for part in self._parts:
            if part.sent_again or len(part.live) != 1:
                continue
            here = set(part.live.values())
            late_at, straggles_at = self._late_at(part), self._straggles_at(part)
            if late_at is not None and now >= late_at and not part.hedge_decided:
                part.hedge_decided = True
                budget = self._shared.budget
                if self._shared.replicas.has_other(here) and budget is not None and budget.take():
                    address = self._shared.replicas.pick(here | self._avoided(part), self._holding(now), part.tokens)
                    part.sent_again = address is not None
                    actions += [self._send(part, address, now)] if address is not None else []
            # Also where there was no budget for a hedge.
            if straggles_at is not None and now >= straggles_at and not part.sent_again:
                address = self._shared.replicas.pick_idle(here | self._avoided(part) | self._holding(now), part.tokens)
                # Without an idle replica the next reply, which makes one idle, asks again.
                if address is not None:
                    part.sent_again = True
                    actions.append(self._send(part, address, now))
            for at in (late_at, straggles_at):
                if at is not None and at > now and not part.sent_again:
                    self._wake(at)
        return actions

    def _late_at(self, part: _Part) -> float | None:
        hedge = self._shared.delivery.hedge
        if hedge is None:
            return None
        delay_s = self._shared.latencies.p95_s(part.tokens) if hedge.delay_s is None else hedge.delay_s
        return None if delay_s is None else part.sent_at + max(delay_s, _MIN_HEDGE_S)

    def _straggles_at(self, part: _Part) -> float | None:
        finished = [each for each in self._parts if each.answerer is not None]
        if not finished or any(each.waiting for each in self._parts):
            return None
        rate = statistics.median(each.seconds / max(1, each.tokens) for each in finished)
        factor = self._shared.delivery.split.straggler_factor
        return part.sent_at + max(_MIN_STRAGGLE_S, factor * rate * part.tokens)

    def _newest(self) -> Answerer | None:
        return max(self._answers.values(), key=lambda who: who.versions, default=None)

    def _reconcile(self) -> None:
        """End, or have those parts answered again that come from older weights than others."""
        answerers = [part.answerer for part in self._parts if part.answerer is not None]
        newest = max(answerers, key=lambda who: who.versions)
        stale = [part for part in self._parts if part.answerer != newest]
        if not stale:
            self.done = True
            return
        for part in stale:
            assert part.answerer is not None
            mismatch = _mismatch(part.answerer, newest)
            part.reasks += 1
            if mismatch.what != "weight_version" or part.reasks > _MAX_REASKS:
                self.done, self.error = True, mismatch
                return
            part.answerer = None
            part.tried.clear()

    def _end(self, attempt: int) -> tuple[_Part, str]:
        part, address = self._attempts.pop(attempt)
        del part.live[attempt]
        self._shared.replicas.release(address, part.tokens)
        return part, address

    def _mark_late(self, now: float) -> None:
        """The deadline is over for all attempts."""
        for part, address in self._attempts.values():
            self._shared.replicas.mark_late(address, now, now - part.sent_at)

    def _finish(self, error: PpodError) -> list[Action]:
        self.error = error
        return self.cancel()

    def _wake(self, at: float) -> None:
        # A replica may ask for a longer wait than the caller has time for.
        self.wake_at = min(at, self.deadline if self.wake_at is None else self.wake_at)


def _mismatch(found: Answerer, newest: Answerer) -> FailedPrecondition:
    """What differs between the replicas that answered one request."""
    for what, one, other in (
        ("model", found.state.model, newest.state.model),
        ("tokenizer", found.state.tokenizer_fingerprint, newest.state.tokenizer_fingerprint),
        ("weight_version", ", ".join(map(str, found.versions)), ", ".join(map(str, newest.versions))),
    ):
        if one != other:
            return FailedPrecondition(what, one, f"{other}, as from another replica")
    return FailedPrecondition("configuration", found.signature, f"{newest.signature}, as from another replica")


def _rebased(error: PpodError, start: int) -> PpodError:
    """The same error with the sample's position in the whole request."""
    if isinstance(error, InvalidArgument | NonFiniteOutput | RewardFailed) and error.sample is not None and start:
        return replace(error, sample=error.sample + start)
    return error
