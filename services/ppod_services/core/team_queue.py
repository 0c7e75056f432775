"""What one team has waiting: by priority, in order of arrival, by length, and by the time that it expires.

Pure, and not thread-safe, like the queue that it is a part of.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, cast

from sortedcontainers import SortedList

from ppod_services.core.batching import BatchShape
from ppod_services.core.callers import Priority
from ppod_services.core.length_index import LengthIndex

_URGENT_AFTER = 0.5
"""Part of its time after which a request is urgent."""

_SEEN = 64
"""Most requests that are looked at in their order for each place in a batch."""


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

    @property
    def packed(self) -> bool:
        """Whether its model runs sequences one after the other, without padding; one answer for a group."""
        ...


QueuedT = TypeVar("QueuedT", bound=Queued)


class Node(Generic[QueuedT]):
    """One waiting sequence."""

    __slots__ = ("order", "request", "sequence", "tokens", "waiting")

    def __init__(self, sequence: QueuedT, order: int) -> None:
        self.sequence = sequence
        self.tokens = sequence.tokens
        self.order = order
        self.waiting = True
        self.request: WaitingRequest[QueuedT] | None = None


class Times(NamedTuple):
    """When a request arrived, and when it is worth nothing any more."""

    arrived_s: float
    expires_s: float


class WaitingRequest(Generic[QueuedT]):
    """One request, its sequences from the longest to the shortest."""

    __slots__ = ("_first", "expiry", "key", "left", "level", "nodes", "team", "urgency", "urgent_s")

    def __init__(
        self,
        key: Hashable,
        team: TeamQueue[QueuedT],
        level: Level[QueuedT],
        nodes: Sequence[Node[QueuedT]],
        times: Times,
    ) -> None:
        self.key = key
        self.team = team
        self.level = level
        self.urgent_s = times.arrived_s + _URGENT_AFTER * (times.expires_s - times.arrived_s)
        # The first node's order makes them unique.
        self.expiry = (times.expires_s, nodes[0].order)
        self.urgency = (self.urgent_s, nodes[0].order)
        self.nodes = sorted(nodes, key=_longest_first)
        self.left = len(nodes)
        self._first = 0
        for node in nodes:
            node.request = self

    def longest(self) -> Node[QueuedT]:
        """The longest sequence that still waits. Each node is passed over once in all."""
        while not self.nodes[self._first].waiting:
            self._first += 1
        return self.nodes[self._first]


class Level(Generic[QueuedT]):
    """What one team has waiting at one priority."""

    def __init__(self) -> None:
        self.tokens = 0
        self.requests: OrderedDict[Hashable, WaitingRequest[QueuedT]] = OrderedDict()
        self.groups: dict[Hashable, LengthIndex[Node[QueuedT]]] = {}
        self._expiries = SortedList()
        self._urgencies = SortedList()
        self._by_expiry: dict[tuple[float, int], WaitingRequest[QueuedT]] = {}

    def join(self, request: WaitingRequest[QueuedT]) -> None:
        """A request begins to wait."""
        self.requests[request.key] = request
        self._expiries.add(request.expiry)
        self._urgencies.add(request.urgency)
        self._by_expiry[request.expiry] = request

    def leave(self, request: WaitingRequest[QueuedT]) -> None:
        """Nothing of a request waits any more."""
        del self.requests[request.key]
        self._expiries.remove(request.expiry)
        self._urgencies.remove(request.urgency)
        del self._by_expiry[request.expiry]

    def expiring(self, before_s: float) -> list[WaitingRequest[QueuedT]]:
        """Requests that expire by this time, the first ones first."""
        early = itertools.takewhile(lambda expiry: expiry[0] <= before_s, self._in_order())
        return [self._by_expiry[expiry] for expiry in early]

    def urgent(self, urgent_s: float) -> Iterator[WaitingRequest[QueuedT]]:
        """Requests that are urgent at this time, those that expire first before others; not all where they are many."""
        # Mostly there is none, which need not be found out from each request.
        if not self._urgencies or cast("tuple[float, int]", self._urgencies[0])[0] > urgent_s:
            return
        for expiry in itertools.islice(self._in_order(), _SEEN):
            request = self._by_expiry[expiry]
            # One that came just now, with little time, is not urgent yet and may expire before others that are.
            if request.urgent_s <= urgent_s:
                yield request

    def _in_order(self) -> Iterator[tuple[float, int]]:
        return cast("Iterator[tuple[float, int]]", iter(self._expiries))

    def nearest(self, group: Hashable, shape: BatchShape, urgent_s: float) -> Node[QueuedT] | None:
        """The sequence that joins a batch, if one may: an urgent one, or else the one that needs the least padding.

        Of two that need the same it is the shorter one. Packed batches need none: there it is one of the oldest
        request, and at the end of a batch the longest that fits.
        """
        index = self.groups.get(group)
        if index is None:
            return None
        oldest = itertools.islice(self.requests.values(), _SEEN) if shape.packed else ()
        for request in itertools.chain(self.urgent(urgent_s), oldest):
            node = request.longest()
            if node.sequence.group == group and shape.takes(node.tokens):
                return node
        if shape.packed:
            return index.longest_at_most(shape.room)
        near = [index.longest_at_most(shape.width), index.shortest_above(shape.width)]
        fitting = [node for node in near if node is not None and shape.takes(node.tokens)]
        return min(fitting, key=lambda node: shape.padding_with(node.tokens), default=None)


class TeamQueue(Generic[QueuedT]):
    """What one team has waiting, and its virtual counter."""

    def __init__(self, name: str, number: int, counter: float) -> None:
        self.name = name
        self.number = number
        self.counter = counter
        self.seen_s = -math.inf
        self.weight = 1.0
        self.tokens = 0
        self.sequences = 0
        self._levels: dict[Priority, Level[QueuedT]] = {
            priority: Level() for priority in sorted(Priority, reverse=True)
        }

    def add(
        self, key: Hashable, priority: Priority, nodes: Sequence[Node[QueuedT]], times: Times
    ) -> WaitingRequest[QueuedT]:
        """A request begins to wait, with all its sequences."""
        level = self._levels[priority]
        request = WaitingRequest(key, self, level, nodes, times)
        level.join(request)
        for node in nodes:
            level.groups.setdefault(node.sequence.group, LengthIndex()).add(node.tokens, node.order, node)
        tokens = sum(node.tokens for node in nodes)
        level.tokens += tokens
        self.tokens += tokens
        self.sequences += len(nodes)
        return request

    def drop(self, request: WaitingRequest[QueuedT], node: Node[QueuedT]) -> None:
        """One sequence of a request waits no longer."""
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
            level.leave(request)
        level.tokens -= node.tokens
        self.tokens -= node.tokens
        self.sequences -= 1

    def expiring(self, before_s: float) -> list[WaitingRequest[QueuedT]]:
        """Requests that expire by this time."""
        return [request for level in self._levels.values() for request in level.expiring(before_s)]

    def leader(self, urgent_s: float) -> tuple[WaitingRequest[QueuedT], Node[QueuedT]]:
        """The sequence that begins a batch: of the highest priority, the most urgent request, or else the oldest."""
        level = next(level for level in self._levels.values() if level.requests)
        request = next(level.urgent(urgent_s), None) or next(iter(level.requests.values()))
        return request, request.longest()

    def nearest(
        self, group: Hashable, shape: BatchShape, urgent_s: float
    ) -> tuple[WaitingRequest[QueuedT], Node[QueuedT]] | None:
        """The sequence that joins a batch, of the highest priority that has one which may."""
        for level in self._levels.values():
            node = level.nearest(group, shape, urgent_s)
            if node is not None and node.request is not None:
                return node.request, node
        return None

    def tokens_at_least(self, priority: Priority) -> int:
        """Tokens that wait at this priority or a higher one."""
        return sum(level.tokens for held, level in self._levels.items() if held >= priority)


def _longest_first(node: Node[QueuedT]) -> tuple[int, int]:
    return -node.tokens, node.order
