"""Whether a request enters the queue, and when a refused one should come back. Pure: no clock, no model.

Order of the checks: what never fits is the caller's fault; then the team's own limits; then the queue's bounds; then
the deadline. A refusal costs nothing: quota is spent only by requests that enter.

Bounds of the queue: half of it is divided among the teams by weight, and a team's own part is never given to another;
the other half is shared first come first served. So a team that floods holds half of the queue and its own part at
most, and the whole never exceeds `max_queue_tokens`. A service with one team gives it all.

Deadlines: with the measured rate R and the team's share s of it, a request of n tokens with q tokens of its team ahead
ends after about (q + n) / (s R), less what the team may catch up, and no later than all that waits together. A request
that would end too late is refused at once, and told how long its team's backlog takes to shrink enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ppod.errors import InvalidArgument, ResourceExhausted
from ppod_services.core.callers import Caller, Team
from ppod_services.core.config import BatchingConfig
from ppod_services.core.promises import Promises
from ppod_services.core.quotas import Quotas
from ppod_services.core.rate import ComputeRate

_LEAST_MARGIN = 1.2
_CLAIM_MARGIN = 1.1
_MOST_MARGIN = 4.0
_MARGIN_UP = 1.1
_MARGIN_DOWN = 0.99
"""Estimates are stretched by a margin: work that ends just after its deadline is compute for nobody. The margin grows
with each batch that had to leave a request behind for being too late, and shrinks with each that had not. A request
that was told to come back had its margin when it was told."""

_UNKNOWN_RATE_WAIT_S = 1.0
_SHORTEST_WAIT_S = 0.01


class Refusal(StrEnum):
    """Why a request was refused, as metrics name it."""

    QUOTA = "quota"
    IN_FLIGHT = "in_flight"
    QUEUE = "queue"
    DEADLINE = "deadline"
    CALLS = "calls"
    BACKLOG = "backlog"
    """Of a function or a judge, whose `max_waiting` texts wait."""


OnRefused = Callable[[str, Refusal], None]
"""Told of each refusal, by team, for metrics."""


def untold(team: str, reason: Refusal) -> None:
    """Tell nobody of a refusal."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """One reason to refuse a request, and how long it lasts."""

    reason: Refusal
    wait_s: float
    what: str


class Backlog(Protocol):
    """What waits, as far as admission cares; see `fair_queue.FairQueue`."""

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        ...

    def __len__(self) -> int:
        """Sequences that wait."""
        ...

    def team_tokens(self, name: str) -> int:
        """Tokens of one team."""
        ...

    def team_sequences(self, name: str) -> int:
        """Sequences of one team."""
        ...

    def tokens_ahead(self, caller: Caller) -> int:
        """Tokens of the caller's team that run before its next request."""
        ...

    def tokens_behind(self, team: Team) -> float:
        """Tokens that the team is served before the others, to catch up."""
        ...

    def share(self, team: Team) -> float:
        """The team's part of the compute."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What asks for admission.

    Attributes:
        tokens: of all its sequences.
        sequences: their number.
        deadline_s: seconds from now after which it is worth nothing.
        caller: whose it is.
        request_id: the caller's name for it; a repeated request has the same one.
    """

    tokens: int
    sequences: int
    deadline_s: float
    caller: Caller
    request_id: str = ""


class Admission:
    """Decides. It holds what teams have in flight; times are seconds of any steady clock.

    Args:
        config: bounds of the queue.
        backlog: the queue.
        rate: the measured speed.
        quotas: what teams have left of theirs.
        on_refused: told of each refusal, by team, for metrics.
    """

    def __init__(
        self,
        config: BatchingConfig,
        backlog: Backlog,
        rate: ComputeRate,
        quotas: Quotas,
        on_refused: OnRefused,
    ) -> None:
        self._config = config
        self._backlog = backlog
        self._rate = rate
        self._quotas = quotas
        self._on_refused = on_refused
        self._promises = Promises()
        self._margin = _LEAST_MARGIN
        self._in_flight: dict[str, int] = {}
        self._parts: dict[str, float] = {}

    def admit(self, request: Request, now_s: float) -> None:
        """Count a request in; every admitted request needs its `leave`.

        Raises:
            InvalidArgument: no wait would let it in. ResourceExhausted: it may come back after the time told, when
            every reason to refuse it will be gone.
        """
        self._check_possible(request)
        team = request.caller.team
        self._parts[team.name] = team.part
        claimed = self._promises.claim(team.name, request.request_id, now_s)
        promised = 0.0 if claimed else self._promises.tokens_soon(team.name, now_s)
        found = [
            self._in_flight_cap(request, now_s),
            self._quota(request, now_s),
            self._room(request, promised, now_s),
            self._deadline(request, promised, now_s, _CLAIM_MARGIN if claimed else self._margin),
        ]
        refusals = [refusal for refusal in found if refusal is not None]
        if refusals:
            longest = max(refusals, key=lambda refusal: refusal.wait_s)
            self._on_refused(team.name, longest.reason)
            raise ResourceExhausted(longest.what, self._place(request, longest, now_s))
        self._quotas.spend(team, request.tokens, now_s)
        self._in_flight[team.name] = self._in_flight.get(team.name, 0) + request.tokens

    def missed(self) -> None:
        """An admitted request was too late when its turn came: the estimates are too bright."""
        self._margin = min(_MOST_MARGIN, self._margin * _MARGIN_UP)

    def kept(self) -> None:
        """A batch was served."""
        self._margin = max(_LEAST_MARGIN, self._margin * _MARGIN_DOWN)

    def leave(self, team: Team, tokens: int) -> None:
        """An admitted request ended, whichever way."""
        self._in_flight[team.name] -= tokens

    def _place(self, request: Request, refusal: _Refusal, now_s: float) -> float:
        """Seconds until a refused request should come back, when it will find its place kept."""
        wait_s = max(refusal.wait_s, _SHORTEST_WAIT_S)
        team, rate = request.caller.team, self._rate.tokens_per_s * self._backlog.share(request.caller.team)
        if refusal.reason not in (Refusal.QUEUE, Refusal.DEADLINE) or not rate:
            return wait_s
        due_s = self._promises.book(team.name, request.request_id, request.tokens, now_s + wait_s, 1 / rate, now_s)
        return due_s - now_s

    def _check_possible(self, request: Request) -> None:
        config, team = self._config, request.caller.team
        for unit, asked, key, bound in (
            ("tokens in all", request.tokens, "max_queue_tokens", config.max_queue_tokens),
            ("sequences", request.sequences, "max_queue_sequences", config.max_queue_sequences),
        ):
            if asked > (most := most_held(team, bound)):
                expected = f"at most {most:.0f}, which is what one team may have in the queue (batching.{key})"
                raise InvalidArgument("request", f"{asked} {unit}", expected)
        self._quotas.check_possible(team, request.tokens)

    def _in_flight_cap(self, request: Request, now_s: float) -> _Refusal | None:
        team, most = request.caller.team, request.caller.team.max_tokens_in_flight
        held = self._in_flight.get(team.name, 0)
        if most is None or held + request.tokens <= most:
            return None
        wait_s = self._seconds(team, held + request.tokens - most, now_s)
        return _Refusal(Refusal.IN_FLIGHT, wait_s, f"team {team.name} has {held} of its {most} tokens in flight")

    def _quota(self, request: Request, now_s: float) -> _Refusal | None:
        team = request.caller.team
        wait_s = self._quotas.wait_s(team, request.tokens, now_s)
        if not wait_s:
            return None
        what = f"team {team.name} has spent its quota of {team.tokens_per_s:g} tokens a second"
        return _Refusal(Refusal.QUOTA, wait_s, what)

    def _room(self, request: Request, promised: float, now_s: float) -> _Refusal | None:
        team, backlog, config = request.caller.team, self._backlog, self._config
        asked = request.tokens + promised if backlog.team_tokens(team.name) else request.tokens
        held_tokens = {name: backlog.team_tokens(name) for name in self._parts}
        held_sequences = {name: backlog.team_sequences(name) for name in self._parts}
        tokens = overflow(team, asked, config.max_queue_tokens, held_tokens, self._parts)
        sequences = overflow(team, request.sequences, config.max_queue_sequences, held_sequences, self._parts)
        if not tokens and not sequences:
            return None
        # What must leave first, in tokens: sequences are taken to be of the queue's mean length.
        mean_tokens = backlog.tokens / max(1, len(backlog))
        wait_s = self._seconds(team, max(tokens, sequences * mean_tokens), now_s)
        held = f"{backlog.team_tokens(team.name)} tokens in {backlog.team_sequences(team.name)} sequences"
        what = f"the queue holds {backlog.tokens} tokens; team {team.name} has {held} of them, and more do not fit"
        return _Refusal(Refusal.QUEUE, wait_s, what)

    def _deadline(self, request: Request, promised: float, now_s: float, margin: float) -> _Refusal | None:
        backlog, rate = self._backlog, self._rate
        if not backlog.tokens or not rate.tokens_per_s:
            # Nothing is ahead, so no wait would help; or nothing is known yet. The deadline itself decides.
            return None
        need_s = margin * self._end_s(request, promised, now_s)
        if need_s <= request.deadline_s:
            return None
        empty_s = backlog.tokens / rate.tokens_per_s + rate.running_s(now_s)
        wait_s = min((need_s - request.deadline_s) / margin, empty_s)
        what = f"the queue needs about {need_s:.3f} s, and the deadline is in {request.deadline_s:.3f} s"
        return _Refusal(Refusal.DEADLINE, wait_s, what)

    def _end_s(self, request: Request, promised: float, now_s: float) -> float:
        """Seconds until the last sequence of a request is done, by estimate, with tokens promised to others first."""
        backlog, team = self._backlog, request.caller.team
        everything = backlog.tokens + promised + request.tokens
        ahead = backlog.tokens_ahead(request.caller) + promised + request.tokens
        at_once = min(ahead, backlog.tokens_behind(team))
        fair = at_once + (ahead - at_once) / backlog.share(team)
        return self._rate.running_s(now_s) + min(everything, fair) / self._rate.tokens_per_s

    def _seconds(self, team: Team, tokens: float, now_s: float) -> float:
        """Seconds until this many tokens of a team are done, by estimate."""
        rate = self._rate.tokens_per_s * self._backlog.share(team)
        return self._rate.running_s(now_s) + tokens / rate if rate else _UNKNOWN_RATE_WAIT_S


def most_held(team: Team, most: int) -> float:
    """What a team could have in an otherwise empty queue: its own part of one half, and the other half, all shared."""
    return (1 + team.part) / 2 * most


def overflow(team: Team, asked: float, most: int, held: Mapping[str, int], parts: Mapping[str, float]) -> float:
    """By how much the shared half of a queue would overflow, were a request of this size to enter.

    Args:
        team: whose request it is.
        asked: its size.
        most: the queue's.
        held: what each team has in it.
        parts: each team's part.
    """
    beyond = max(0.0, held[team.name] + asked - team.part * most / 2)
    others = sum(max(0.0, held[name] - part * most / 2) for name, part in parts.items() if name != team.name)
    return max(0.0, beyond + others - most / 2) if beyond else 0.0
