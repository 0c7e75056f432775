"""Each team's quota: a bucket of tokens that fills at a steady rate, and a cap on tokens in flight. Pure: no clock."""

from __future__ import annotations

from dataclasses import dataclass

from ppod.errors import InvalidArgument
from ppod_services.core.callers import Team


@dataclass(slots=True)
class _Bucket:
    """What was left of the quota at a time."""

    tokens: float
    at_s: float


class Quotas:
    """Spends quotas. What is spent is known by the team's name, so it survives a reload that changes the limits.

    Times are seconds of any steady clock.
    """

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def check_possible(self, team: Team, tokens: int) -> None:
        """Raise InvalidArgument for a request that the team's limits never allow, however long it waits."""
        bounds = (
            ("the burst of the team's quota, tokens_per_s * burst_s", capacity_tokens(team)),
            ("the team's max_tokens_in_flight", team.max_tokens_in_flight),
        )
        for what, most in bounds:
            if most is not None and tokens > most:
                raise InvalidArgument("request", f"{tokens} tokens in all", f"at most {most:.0f}, {what}")

    def wait_s(self, team: Team, tokens: int, now_s: float) -> float:
        """Seconds until the bucket holds this many tokens; zero when it does now."""
        rate = team.tokens_per_s
        if rate is None:
            return 0.0
        return max(0.0, (tokens - self._filled(team, rate, now_s).tokens) / rate)

    def spend(self, team: Team, tokens: int, now_s: float) -> None:
        """Take tokens out of the team's bucket."""
        if team.tokens_per_s is not None:
            self._filled(team, team.tokens_per_s, now_s).tokens -= tokens

    def _filled(self, team: Team, rate: float, now_s: float) -> _Bucket:
        capacity = rate * team.burst_s
        bucket = self._buckets.get(team.name)
        if bucket is None:
            bucket = self._buckets[team.name] = _Bucket(capacity, now_s)
        bucket.tokens = min(capacity, bucket.tokens + rate * (now_s - bucket.at_s))
        bucket.at_s = now_s
        return bucket


def capacity_tokens(team: Team) -> float | None:
    """Most tokens that a team's bucket holds; None without a quota."""
    return None if team.tokens_per_s is None else team.tokens_per_s * team.burst_s
