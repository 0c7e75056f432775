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
    """A batch while it is being filled."""

    def __init__(self, leader_tokens: int, bounds: BatchBounds) -> None:
        self.width = leader_tokens
        self.size = 1
        self._tokens = leader_tokens
        self._bounds = bounds

    @property
    def full(self) -> bool:
        """Whether not even a sequence that needs no further padding fits."""
        return self.size >= self._bounds.max_size or self.width * (self.size + 1) > self._bounds.max_tokens

    def padding_with(self, tokens: int) -> int:
        """Padding tokens of the whole batch, were a sequence of this length to join."""
        return max(self.width, tokens) * (self.size + 1) - self._tokens - tokens

    def takes(self, tokens: int) -> bool:
        """Whether a sequence of this length may join."""
        bounds = self._bounds
        padded = max(self.width, tokens) * (self.size + 1)
        if self.size >= bounds.max_size or padded > bounds.max_tokens:
            return False
        return self.padding_with(tokens) <= bounds.overhead_tokens + padded // 16

    def join(self, tokens: int) -> None:
        """A sequence of this length joins."""
        self.width = max(self.width, tokens)
        self.size += 1
        self._tokens += tokens


def padded_tokens(batch: Sequence[Sized]) -> int:
    """Tokens of a batch when each sequence is padded to the longest."""
    return len(batch) * max(entry.tokens for entry in batch)
