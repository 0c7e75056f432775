"""Work that waits for something that is no model: bounded, fair between teams, with a truthful wait for the rest."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from ppod.errors import InvalidArgument, ResourceExhausted
from ppod_services.core.admission import OnRefused, Refusal, most_held, overflow, untold
from ppod_services.core.batching import BatchBounds
from ppod_services.core.callers import Caller
from ppod_services.core.fair_queue import FairQueue

_DECAY = 0.8
_FIRST_GUESS_S = 1.0
_LONGEST_RETRY_S = 60.0
_ONE = BatchBounds(max_tokens=1, max_size=1, overhead_tokens=0)


class Backlog:
    """Counts texts that wait or run, and measures how fast they go.

    Half of the room is divided among the teams by their parts, the other half is for whoever comes: a team that floods
    leaves room for the others.

    Args:
        what: whose backlog it is, for errors.
        most: most texts at a time.
        on_refused: told of each refusal.
    """

    def __init__(self, what: str, most: int, on_refused: OnRefused = untold) -> None:
        self._on_refused = on_refused
        self._what = what
        self._most = most
        self._held: Counter[str] = Counter()
        self._parts: dict[str, float] = {}
        self._texts_per_s = 0.0

    @contextmanager
    def hold(self, caller: Caller, texts: int) -> Generator[None]:
        """Count texts while the block runs.

        Raises:
            InvalidArgument: they alone are too many. ResourceExhausted: they are too many now.
        """
        team = caller.team
        most = int(most_held(team, self._most))
        if texts > most:
            raise InvalidArgument("request", f"{texts} texts for {self._what}", f"at most {most}")
        self._parts[team.name] = team.part
        waiting = self._held.total()
        if overflow(team, texts, self._most, self._held, self._parts):
            self._on_refused(team.name, Refusal.BACKLOG)
            retry_s = waiting / self._texts_per_s if self._texts_per_s else _FIRST_GUESS_S
            raise ResourceExhausted(
                f"{self._what}: {waiting} texts wait, {self._held[team.name]} of them of team {team.name}, and "
                f"{self._most} are the most",
                min(max(retry_s, 0.01), _LONGEST_RETRY_S),
            )
        self._held[team.name] += texts
        start = time.monotonic()
        try:
            yield
        finally:
            self._held[team.name] -= texts
        rate = (waiting + texts) / max(time.monotonic() - start, 1e-6)
        self._texts_per_s = rate if not self._texts_per_s else _DECAY * self._texts_per_s + (1 - _DECAY) * rate


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """One piece of work that waits for a place; `tokens` is its cost in texts."""

    tokens: int
    granted: asyncio.Future[None]
    group: None = None
    packed: bool = False


class Turns:
    """Hands out places one by one: to the team that had the fewest texts for its weight; see `FairQueue`.

    Args:
        places: pieces of work at a time.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._queue: FairQueue[_Turn] = FairQueue(catch_up_tokens=0)

    async def take(self, caller: Caller, texts: int) -> None:
        """Wait for a place; each that is taken must be given back."""
        loop = asyncio.get_running_loop()
        turn = _Turn(texts, loop.create_future())
        self._queue.add(turn, caller, [turn], loop.time())
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.cancelled():
                self._queue.remove(turn)
            else:
                self.give_back()
            raise

    def give_back(self) -> None:
        """A place is free again."""
        self._free += 1
        self._grant()

    @asynccontextmanager
    async def place(self, caller: Caller, texts: int) -> AsyncGenerator[None]:
        """Hold a place while the block runs."""
        await self.take(caller, texts)
        try:
            yield
        finally:
            self.give_back()

    def _grant(self) -> None:
        while self._free and len(self._queue):
            [turn] = self._queue.take(_ONE)
            # A caller that went away just now takes none.
            if not turn.granted.done():
                self._free -= 1
                turn.granted.set_result(None)
