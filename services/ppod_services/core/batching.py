"""Which sequences go together: the bounds of a batch and what padding costs. Pure: no clock, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Sized(Protocol):
    """A sequence, as far as batches care."""

    @property
    def tokens(self) -> int:
        """Length; for generation with the room for its completion."""
        ...

    @property
    def packed(self) -> bool:
        """Whether its model runs sequences one after the other, without padding."""
        ...


@dataclass(frozen=True, slots=True)
class BatchBounds:
    """How large a batch may get.

    Attributes:
        max_tokens: most tokens, padding included. A single sequence may exceed it: else it would never run.
        max_size: most sequences.
        overhead_tokens: what starting a batch costs, in tokens of compute. Padding is worth its price up to here,
            plus a sixteenth of the batch, which is what neighbours in a well-filled queue differ by.
    """

    max_tokens: int
    max_size: int
    overhead_tokens: int


class BatchShape:
    """A batch while it is being filled; the sequence that leads it decides whether it is padded or packed."""

    def __init__(self, leader: Sized, bounds: BatchBounds) -> None:
        self.width = leader.tokens
        self.size = 1
        self.packed = leader.packed
        self._tokens = leader.tokens
        self._bounds = bounds

    @staticmethod
    def of(running: Sequence[Sized], bounds: BatchBounds) -> BatchShape:
        """The shape of a batch that runs; at least one sequence."""
        shape = BatchShape(running[0], bounds)
        for sized in running[1:]:
            shape.join(sized.tokens)
        return shape

    @property
    def full(self) -> bool:
        """Whether not even a sequence that needs no further padding fits."""
        least = self._tokens + 1 if self.packed else self.width * (self.size + 1)
        return self.size >= self._bounds.max_size or least > self._bounds.max_tokens

    @property
    def room(self) -> int:
        """Tokens left in a packed batch."""
        return self._bounds.max_tokens - self._tokens

    def padding_with(self, tokens: int) -> int:
        """Padding tokens of the whole batch, were a sequence of this length to join."""
        return self._tokens_with(tokens) - self._tokens - tokens

    def takes(self, tokens: int) -> bool:
        """Whether a sequence of this length may join."""
        bounds = self._bounds
        total = self._tokens_with(tokens)
        if self.size >= bounds.max_size or total > bounds.max_tokens:
            return False
        return self.padding_with(tokens) <= bounds.overhead_tokens + total // 16

    def join(self, tokens: int) -> None:
        """A sequence of this length joins."""
        self.width = max(self.width, tokens)
        self.size += 1
        self._tokens += tokens

    def _tokens_with(self, tokens: int) -> int:
        return self._tokens + tokens if self.packed else max(self.width, tokens) * (self.size + 1)


def computed_tokens(batch: Sequence[Sized]) -> int:
    """Tokens that a batch computes: its own, and padding to the longest where it is not packed."""
    if batch[0].packed:
        return sum(entry.tokens for entry in batch)
    return len(batch) * max(entry.tokens for entry in batch)
