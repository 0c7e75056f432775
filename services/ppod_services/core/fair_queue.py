"""The queue: fair between teams by tokens, strict by priority within a team, first come first served within those.

Fairness is that of the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
each team has a counter of the tokens it was served, divided by its weight, and the lowest counter is served next. While
two teams of weights w and v both have work, their counters differ by no more than the dearest sequence,
max(tokens / w), so that neither gets more than its share by more than that, however many requests the other sends.

One thing differs from the paper. There a team that comes back from a pause is lifted to the lowest counter of those at
work: what it left unused is gone. Here it keeps up to `catch_up_tokens` of it, if its last request was no more than
half a minute ago. A team that steadily asks for less than its share is thus served at once in its bursts, which is what
holds its tail latency beside a team that floods; over any interval it can exceed its share by `catch_up_tokens` at
most. One that comes back after a longer time has no such claim, or its first flood would push a steady team aside.
Zero tokens give the paper's rule.

Padded batches of similar lengths serve young requests before old ones, and under overload the old ones would expire. So
a request that has waited for half of its time is urgent: those that expire first go first within their team and
priority, before those of the right length.

Pure: no clock, no model, no transport. Not thread-safe: the scheduler holds a lock.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic

from ppod_services.core.batching import BatchBounds, BatchShape
from ppod_services.core.callers import Caller, Team
from ppod_services.core.team_queue import Node, QueuedT, TeamQueue, Times, WaitingRequest

STEADY_S = 30.0
"""A team counts as using the service for this long after its last request."""


class FairQueue(Generic[QueuedT]):
    """Waiting sequences of all teams.

    Adding and removing a request costs O(log n) for each of its sequences, and so does each sequence of a batch that
    is taken; n is the number of distinct lengths.

    Args:
        catch_up_tokens: most tokens that a team may be behind its share when it comes back; see the module. Times are
            seconds of any steady clock.
    """

    def __init__(self, catch_up_tokens: int) -> None:
        self.tokens = 0
        self._count = 0
        self._catch_up_tokens = catch_up_tokens
        self._orders = itertools.count()
        self._teams: dict[str, TeamQueue[QueuedT]] = {}
        self._requests: dict[Hashable, WaitingRequest[QueuedT]] = {}
        self._served_up_to = 0.0

    def __len__(self) -> int:
        return self._count

    @property
    def requests(self) -> int:
        """Requests that have a sequence waiting."""
        return len(self._requests)

    def add(
        self,
        request: Hashable,
        caller: Caller,
        sequences: Sequence[QueuedT],
        now_s: float,
        expires_s: float = math.inf,
    ) -> None:
        """Enqueue all sequences of a request, which is worth nothing from `expires_s` on.

        `request` is unique among those that wait.
        """
        team = self._team(caller.team)
        if not team.tokens:
            self._lift(team, steady=now_s - team.seen_s <= STEADY_S)
        team.seen_s = now_s
        nodes = [Node(sequence, next(self._orders)) for sequence in sequences]
        self._requests[request] = team.add(request, caller.priority, nodes, Times(now_s, expires_s))
        self.tokens += sum(node.tokens for node in nodes)
        self._count += len(nodes)

    def remove(self, request: Hashable) -> list[QueuedT]:
        """Take away what still waits of a request, in its order; nothing for one that is unknown."""
        found = self._requests.get(request)
        if found is None:
            return []
        gone = sorted((node for node in found.nodes if node.waiting), key=_order)
        for node in gone:
            self._drop(found, node)
        return [node.sequence for node in gone]

    def expire(self, before_s: float) -> list[QueuedT]:
        """Take away all that waits of requests that expire by this time."""
        expired = [request for team in self._teams.values() for request in team.expiring(before_s)]
        return [sequence for request in expired for sequence in self.remove(request.key)]

    def take(self, bounds: BatchBounds, now_s: float = 0.0) -> list[QueuedT]:
        """Choose the next batch and take it out.

        The team with the lowest counter leads, with the longest sequence of its oldest request of the highest
        priority. Then, one by one, the team that has the lowest counter by now adds the sequence of the same group
        that needs the least padding, or that of its oldest request where there is none, as long as bounds allow; urgent
        requests lead and add before all others. Without those the choice depends on nothing but the queue, and ties
        keep their order; a lone request is never urgent. So a caller who is alone gets the same batches, and the same
        bits, each time.

        Returns:
            At least one sequence, even where that alone exceeds the bounds; empty for an empty queue.
        """
        leading = min((team for team in self._teams.values() if team.tokens), key=_rank, default=None)
        if leading is None:
            return []
        self._served_up_to = leading.counter
        urgent_s = now_s if self.requests > 1 else -math.inf
        request, node = leading.leader(urgent_s)
        shape = BatchShape(node.sequence, bounds)
        batch = [self._serve(request, node)]
        self._fill(batch, shape, node.sequence.group, urgent_s)
        return batch

    def join(self, running: Sequence[QueuedT], bounds: BatchBounds, now_s: float) -> list[QueuedT]:
        """Choose who joins a batch that runs, and take them out; by the rules of `take`, but nobody leads.

        Nobody joins past an urgent sequence that does not fit: in a batch that never ends it would wait for ever.
        """
        leading = min((team for team in self._teams.values() if team.tokens), key=_rank, default=None)
        if leading is None:
            return []
        urgent_s = now_s if self.requests > 1 else -math.inf
        shape, group = BatchShape.of(running, bounds), running[0].group
        request, node = leading.leader(urgent_s)
        fits = node.sequence.group == group and shape.takes(node.tokens)
        if request.urgent_s <= urgent_s and not fits:
            return []
        self._served_up_to = leading.counter
        batch: list[QueuedT] = []
        self._fill(batch, shape, group, urgent_s)
        return batch

    def _fill(self, batch: list[QueuedT], shape: BatchShape, group: Hashable, urgent_s: float) -> None:
        """Add one sequence after the other, each of the team that has the lowest counter by then."""
        ranked = [(team.counter, team.number, team) for team in self._teams.values() if team.tokens]
        heapq.heapify(ranked)
        while ranked and not shape.full:
            team = ranked[0][2]
            found = team.nearest(group, shape, urgent_s)
            if found is None:
                heapq.heappop(ranked)
                continue
            shape.join(found[1].tokens)
            batch.append(self._serve(*found))
            heapq.heapreplace(ranked, (team.counter, team.number, team))

    def teams_since(self, start_s: float) -> int:
        """Teams that sent a request at this time or later."""
        return sum(1 for team in self._teams.values() if team.seen_s >= start_s)

    def team_tokens(self, name: str) -> int:
        """Tokens of a team that wait."""
        team = self._teams.get(name)
        return team.tokens if team is not None else 0

    def team_sequences(self, name: str) -> int:
        """Sequences of a team that wait."""
        team = self._teams.get(name)
        return team.sequences if team is not None else 0

    def tokens_ahead(self, caller: Caller) -> int:
        """Tokens of the caller's own team that would run before its next request."""
        team = self._teams.get(caller.team.name)
        return team.tokens_at_least(caller.priority) if team is not None else 0

    def tokens_behind(self, team: Team) -> float:
        """Tokens that a team may still be served before all others, because it had less than its share."""
        known = self._teams.get(team.name)
        if known is None:
            return 0.0
        floor = min((other.counter for other in self._busy() if other is not known), default=self._served_up_to)
        behind = max(0.0, floor - known.counter) * team.weight
        return behind if known.tokens else min(behind, self._catch_up_tokens)

    def share(self, team: Team) -> float:
        """Part of the compute that is a team's while those who wait now go on waiting, in (0, 1]."""
        others = sum(busy.weight for busy in self._busy() if busy.name != team.name)
        return team.weight / (team.weight + others)

    def _busy(self) -> Iterator[TeamQueue[QueuedT]]:
        return (team for team in self._teams.values() if team.tokens)

    def _team(self, team: Team) -> TeamQueue[QueuedT]:
        queue = self._teams.get(team.name)
        if queue is None:
            queue = self._teams[team.name] = TeamQueue(team.name, len(self._teams), self._floor())
        # A reload may have changed it.
        queue.weight = team.weight
        return queue

    def _lift(self, team: TeamQueue[QueuedT], *, steady: bool) -> None:
        catch_up_tokens = self._catch_up_tokens if steady else 0
        team.counter = max(team.counter, self._floor() - catch_up_tokens / team.weight)

    def _floor(self) -> float:
        """The lowest counter at work; where nobody is, that of the last team that was served."""
        return min((team.counter for team in self._busy()), default=self._served_up_to)

    def _serve(self, request: WaitingRequest[QueuedT], node: Node[QueuedT]) -> QueuedT:
        self._drop(request, node)
        request.team.counter += node.tokens / request.team.weight
        return node.sequence

    def _drop(self, request: WaitingRequest[QueuedT], node: Node[QueuedT]) -> None:
        request.team.drop(request, node)
        self.tokens -= node.tokens
        self._count -= 1
        if not request.left:
            del self._requests[request.key]


def _rank(team: TeamQueue[QueuedT]) -> tuple[float, int]:
    return team.counter, team.number


def _order(node: Node[QueuedT]) -> int:
    return node.order
