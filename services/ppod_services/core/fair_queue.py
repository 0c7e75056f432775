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

Pure: no clock, no model, no transport. Not thread-safe: the scheduler holds a lock.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from ppod_services.core.batching import BatchBounds, BatchShape
from ppod_services.core.callers import Caller, Priority, Team
from ppod_services.core.length_index import LengthIndex

STEADY_S = 30.0
"""A team counts as using the service for this long after its last request."""


class Queued(Protocol):
    """What the queue must know of a sequence."""

    @property
    def tokens(self) -> int:
        """Length; for generation with the room for its completion."""
        ...

    @property
    def group(self) -> Hashable:
        """Only sequences with equal groups share a batch."""
        ...


QueuedT = TypeVar("QueuedT", bound=Queued)


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
        self._teams: dict[str, _TeamQueue[QueuedT]] = {}
        self._requests: dict[Hashable, _Request[QueuedT]] = {}
        self._served_up_to = 0.0

    def __len__(self) -> int:
        return self._count

    @property
    def requests(self) -> int:
        """Requests that have a sequence waiting."""
        return len(self._requests)

    def add(self, request: Hashable, caller: Caller, sequences: Sequence[QueuedT], now_s: float) -> None:
        """Enqueue all sequences of a request; `request` is unique among those that wait."""
        team = self._team(caller.team)
        if not team.tokens:
            self._lift(team, steady=now_s - team.seen_s <= STEADY_S)
        team.seen_s = now_s
        nodes = [_Node(sequence, next(self._orders)) for sequence in sequences]
        self._requests[request] = team.add(request, caller.priority, nodes)
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

    def take(self, bounds: BatchBounds) -> list[QueuedT]:
        """Choose the next batch and take it out.

        The team with the lowest counter leads, with the longest sequence of its oldest request of the highest
        priority. Then, one by one, the team that has the lowest counter by now adds the sequence of the same group
        that needs the least padding, as long as bounds allow. The choice depends on nothing but the queue, and ties
        keep their order: a caller who is alone gets the same batches, and so the same bits, each time.

        Returns:
            At least one sequence, even where that alone exceeds the bounds; empty for an empty queue.
        """
        leading = min((team for team in self._teams.values() if team.tokens), key=_rank, default=None)
        if leading is None:
            return []
        self._served_up_to = leading.counter
        request, node = leading.leader()
        shape = BatchShape(node.tokens, bounds)
        batch = [self._serve(request, node)]
        group = node.sequence.group
        ranked = [(team.counter, team.number, team) for team in self._teams.values() if team.tokens]
        heapq.heapify(ranked)
        while ranked and not shape.full:
            team = ranked[0][2]
            found = team.nearest(group, shape)
            if found is None:
                heapq.heappop(ranked)
                continue
            shape.join(found[1].tokens)
            batch.append(self._serve(*found))
            heapq.heapreplace(ranked, (team.counter, team.number, team))
        return batch

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

    def _busy(self) -> Iterator[_TeamQueue[QueuedT]]:
        return (team for team in self._teams.values() if team.tokens)

    def _team(self, team: Team) -> _TeamQueue[QueuedT]:
        queue = self._teams.get(team.name)
        if queue is None:
            queue = self._teams[team.name] = _TeamQueue(team.name, len(self._teams), self._floor())
        # A reload may have changed it.
        queue.weight = team.weight
        return queue

    def _lift(self, team: _TeamQueue[QueuedT], *, steady: bool) -> None:
        catch_up_tokens = self._catch_up_tokens if steady else 0
        team.counter = max(team.counter, self._floor() - catch_up_tokens / team.weight)

    def _floor(self) -> float:
        """The lowest counter at work; where nobody is, that of the last team that was served."""
        return min((team.counter for team in self._busy()), default=self._served_up_to)

    def _serve(self, request: _Request[QueuedT], node: _Node[QueuedT]) -> QueuedT:
        self._drop(request, node)
        request.team.counter += node.tokens / request.team.weight
        return node.sequence

    def _drop(self, request: _Request[QueuedT], node: _Node[QueuedT]) -> None:
        request.team.drop(request, node)
        self.tokens -= node.tokens
        self._count -= 1
        if not request.left:
            del self._requests[request.key]


class _Node(Generic[QueuedT]):
    """One waiting sequence."""

    __slots__ = ("order", "request", "sequence", "tokens", "waiting")

    def __init__(self, sequence: QueuedT, order: int) -> None:
        self.sequence = sequence
        self.tokens = sequence.tokens
        self.order = order
        self.waiting = True
        self.request: _Request[QueuedT] | None = None


class _Request(Generic[QueuedT]):
    """One request, its sequences from the longest to the shortest."""

    __slots__ = ("_first", "key", "left", "level", "nodes", "team")

    def __init__(
        self, key: Hashable, team: _TeamQueue[QueuedT], level: _Level[QueuedT], nodes: Sequence[_Node[QueuedT]]
    ) -> None:
        self.key = key
        self.team = team
        self.level = level
        self.nodes = sorted(nodes, key=_longest_first)
        self.left = len(nodes)
        self._first = 0
        for node in nodes:
            node.request = self

    def longest(self) -> _Node[QueuedT]:
        """The longest sequence that still waits. Each node is passed over once in all."""
        while not self.nodes[self._first].waiting:
            self._first += 1
        return self.nodes[self._first]


class _Level(Generic[QueuedT]):
    """What one team has waiting at one priority."""

    def __init__(self) -> None:
        self.tokens = 0
        self.requests: OrderedDict[Hashable, _Request[QueuedT]] = OrderedDict()
        self.groups: dict[Hashable, LengthIndex[_Node[QueuedT]]] = {}

    def nearest(self, group: Hashable, shape: BatchShape) -> _Node[QueuedT] | None:
        """The sequence that needs the least padding beside a batch, if it may join; the shorter one of two."""
        index = self.groups.get(group)
        if index is None:
            return None
        near = [index.longest_at_most(shape.width), index.shortest_above(shape.width)]
        fitting = [node for node in near if node is not None and shape.takes(node.tokens)]
        return min(fitting, key=lambda node: shape.padding_with(node.tokens), default=None)


class _TeamQueue(Generic[QueuedT]):
    """What one team has waiting, and its virtual counter."""

    def __init__(self, name: str, number: int, counter: float) -> None:
        self.name = name
        self.number = number
        self.counter = counter
        self.seen_s = -math.inf
        self.weight = 1.0
        self.tokens = 0
        self.sequences = 0
        self._levels: dict[Priority, _Level[QueuedT]] = {
            priority: _Level() for priority in sorted(Priority, reverse=True)
        }

    def add(self, key: Hashable, priority: Priority, nodes: Sequence[_Node[QueuedT]]) -> _Request[QueuedT]:
        level = self._levels[priority]
        request = level.requests[key] = _Request(key, self, level, nodes)
        for node in nodes:
            level.groups.setdefault(node.sequence.group, LengthIndex()).add(node.tokens, node.order, node)
        tokens = sum(node.tokens for node in nodes)
        level.tokens += tokens
        self.tokens += tokens
        self.sequences += len(nodes)
        return request

    def drop(self, request: _Request[QueuedT], node: _Node[QueuedT]) -> None:
        level, group = request.level, node.sequence.group
        node.waiting = False
        # Ends the reference cycle, so that memory is free at once and not at some later collection.
        node.request = None
        index = level.groups[group]
        index.remove(node.tokens, node.order)
        if not index:
            # Groups may be as many as the temperatures that callers think of.
            del level.groups[group]
        request.left -= 1
        if not request.left:
            del level.requests[request.key]
        level.tokens -= node.tokens
        self.tokens -= node.tokens
        self.sequences -= 1

    def leader(self) -> tuple[_Request[QueuedT], _Node[QueuedT]]:
        level = next(level for level in self._levels.values() if level.requests)
        request = next(iter(level.requests.values()))
        return request, request.longest()

    def nearest(self, group: Hashable, shape: BatchShape) -> tuple[_Request[QueuedT], _Node[QueuedT]] | None:
        for level in self._levels.values():
            node = level.nearest(group, shape)
            if node is not None and node.request is not None:
                return node.request, node
        return None

    def tokens_at_least(self, priority: Priority) -> int:
        return sum(level.tokens for held, level in self._levels.items() if held >= priority)


def _rank(team: _TeamQueue[QueuedT]) -> tuple[float, int]:
    return team.counter, team.number


def _order(node: _Node[QueuedT]) -> int:
    return node.order


def _longest_first(node: _Node[QueuedT]) -> tuple[int, int]:
    return -node.tokens, node.order
