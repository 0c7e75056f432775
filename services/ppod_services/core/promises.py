"""Keeps a place for refused requests that were told when to come back, so that what they were told is true.

Without it, the room that a wait frees goes to whoever comes first; under ten times the sustainable load nine of ten
who obeyed would find it taken. With it, refused requests form a line in time: each is told a moment after the one
before, spaced by what the model does meanwhile, and newcomers see the places that fall due soon as taken.

Many never come back. The line is therefore overbooked by the part that did of late, and a place that is not claimed
within seconds is free again. Requests are known by their ids; those without one only get an estimate. Pure: no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

_SOON_S = 1.0
_GRACE_S = 2.0
"""How late a request may be for its place: the way through the network, and the jitter of polite clients."""
_EARLY_S = 0.02
_MOST = 10_000
"""Places of one team: bounds memory, and the line at the speed of any model that is worth waiting for."""
_FIRST_RETURNING = 1.0
_LEAST_RETURNING = 0.05
_KEPT = 0.98


@dataclass(slots=True)
class _Place:
    due_s: float
    tokens: int
    claimed: bool = False


class _Line:
    """The places of one team, by request id, in the order in which they fall due."""

    def __init__(self) -> None:
        self.places: OrderedDict[str, _Place] = OrderedDict()
        self.last_due_s = 0.0
        self.returning = _FIRST_RETURNING

    def lapse(self, now_s: float) -> None:
        """Free the places that nobody claimed in time."""
        while self.places:
            place = next(iter(self.places.values()))
            if place.due_s + _GRACE_S > now_s:
                return
            self.places.popitem(last=False)
            self.note(returned=place.claimed)

    def note(self, *, returned: bool) -> None:
        self.returning = max(_LEAST_RETURNING, _KEPT * self.returning + (1 - _KEPT) * returned)


class Promises:
    """The lines of all teams. Times are seconds of any steady clock."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def claim(self, team: str, request_id: str, now_s: float) -> bool:
        """Whether a request comes for its place. A call that enters the queue in parts claims it with each of them."""
        place = self._line(team, now_s).places.get(request_id)
        if place is None or now_s < place.due_s - _EARLY_S:
            return False
        place.claimed = True
        return True

    def tokens_soon(self, team: str, now_s: float) -> float:
        """Tokens of those who are expected within a moment."""
        line = self._line(team, now_s)
        tokens = 0
        for place in line.places.values():
            if place.due_s > now_s + _SOON_S:
                break
            tokens += 0 if place.claimed else place.tokens
        return tokens * line.returning

    def book(self, team: str, request_id: str, tokens: int, earliest_s: float, token_s: float, now_s: float) -> float:
        """Give a refused request a place.

        Args:
            team, request_id: whose place; an empty id gets none.
            tokens: of the request.
            earliest_s: when there will be room for it by the queue alone.
            token_s: seconds that the model takes for one of the team's tokens.
            now_s: the time.

        Returns:
            When to come.
        """
        line = self._line(team, now_s)
        if not request_id:
            return max(earliest_s, line.last_due_s)
        line.places.pop(request_id, None)
        due_s = max(earliest_s, line.last_due_s + tokens * token_s * line.returning)
        if len(line.places) < _MOST:
            line.places[request_id] = _Place(due_s, tokens)
            line.last_due_s = due_s
        return due_s

    def _line(self, team: str, now_s: float) -> _Line:
        line = self._lines.setdefault(team, _Line())
        line.lapse(now_s)
        return line
