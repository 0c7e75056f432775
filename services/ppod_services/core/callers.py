"""Who calls: the team that a call was authenticated as, on its way from the interceptor to the scheduler."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum

from ppod.errors import InvalidArgument


class Priority(IntEnum):
    """Order among the requests of one team; the numbers of `ppod.v1.Priority`."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True)
class Team:
    """Who shares the service, and how much of it is theirs.

    Attributes:
        name: unique; a label of metrics and logs.
        weight: share of the compute among teams that have work waiting, relative to theirs.
        tokens_per_s: quota of accepted tokens a second, averaged over `burst_s`; None: no quota.
        burst_s: seconds of quota that may be spent at once.
        max_tokens_in_flight: most tokens waiting and running at a time; None: only the queue's bound.
        part: its weight over that of all teams of the file, in (0, 1]; what it may always have of the queue.
    """

    name: str
    weight: float = 1.0
    tokens_per_s: float | None = None
    burst_s: float = 10.0
    max_tokens_in_flight: int | None = None
    part: float = 1.0


ANONYMOUS = Team("anonymous")
"""Every caller of a service without authentication."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose work an entry in the queue is, and how urgent to them."""

    team: Team = ANONYMOUS
    priority: Priority = Priority.NORMAL


ANONYMOUS_CALLER = Caller()

current_team: ContextVar[Team] = ContextVar("current_team", default=ANONYMOUS)
"""The team of the call that the current task serves; the interceptor sets it."""

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")
"""The id that the caller gave to the current request; the same when it repeats one. Empty where it gave none."""


def caller_of(priority: int) -> Caller:
    """The caller of the current call, with the priority field of its request; raise InvalidArgument for another one."""
    try:
        return Caller(current_team.get(), Priority(priority or Priority.NORMAL))
    except ValueError as error:
        raise InvalidArgument("priority", str(priority), "a value of ppod.v1.Priority") from error
