"""Waiting sequences by length, so that the one nearest to a batch's width is found at once however many wait."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from typing import Generic, TypeVar

SequenceT = TypeVar("SequenceT")


class LengthIndex(Generic[SequenceT]):
    """A multiset of sequences keyed by length; equal lengths keep their order of arrival.

    Every operation costs O(log d) comparisons for d distinct lengths, which the model's longest sequence bounds,
    whatever the number of sequences.
    """

    def __init__(self) -> None:
        self._lengths: list[int] = []
        # An OrderedDict takes its oldest key away in constant time; a dict scans over the keys removed before it.
        self._waiting: dict[int, OrderedDict[int, SequenceT]] = {}

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def add(self, tokens: int, order: int, sequence: SequenceT) -> None:
        """Add a sequence; `order` is unique and grows with every arrival."""
        bucket = self._waiting.get(tokens)
        if bucket is None:
            bucket = self._waiting[tokens] = OrderedDict()
            insort(self._lengths, tokens)
        bucket[order] = sequence

    def remove(self, tokens: int, order: int) -> None:
        """Take a sequence away again."""
        bucket = self._waiting[tokens]
        del bucket[order]
        if not bucket:
            del self._waiting[tokens]
            del self._lengths[bisect_left(self._lengths, tokens)]

    def longest_at_most(self, tokens: int) -> SequenceT | None:
        """The longest sequence of up to this length, the oldest of its kind."""
        at = bisect_right(self._lengths, tokens)
        return self._oldest(self._lengths[at - 1]) if at else None

    def shortest_above(self, tokens: int) -> SequenceT | None:
        """The shortest sequence of more than this length, the oldest of its kind."""
        at = bisect_right(self._lengths, tokens)
        return self._oldest(self._lengths[at]) if at < len(self._lengths) else None

    def _oldest(self, tokens: int) -> SequenceT:
        return next(iter(self._waiting[tokens].values()))
