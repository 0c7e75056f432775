"""Which waiting sequences form the next batch. Pure: no clock, no model, no transport."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Queued(Protocol):
    """What batch formation must know of a waiting sequence."""

    @property
    def tokens(self) -> int:
        """Length; for generation with the room for its completion."""
        ...

    @property
    def group(self) -> Hashable:
        """Only sequences with equal groups share a batch."""
        ...

    def same_request(self, other: object) -> bool:
        """Whether both came with one request."""
        ...


QueuedT = TypeVar("QueuedT", bound=Queued)


def form_batch(queue: Sequence[QueuedT], max_batch_tokens: int, max_batch_size: int) -> list[QueuedT]:
    """Choose the next batch from a queue in order of arrival.

    The longest sequence of the oldest request leads, so that no request starves. Sequences of its group that are no
    longer join it, longest first, then longer ones, shortest first, while the padded size stays within both bounds.
    The choice depends on the queue alone and ties keep their order: a caller who is alone gets the same batches, and
    so the same bits, each time.

    Returns:
        A batch, at least one sequence even where that alone exceeds `max_batch_tokens`; empty for an empty queue.
    """
    if not queue:
        return []
    oldest = queue[0]
    leader = max((entry for entry in queue if entry.same_request(oldest) and entry.group == oldest.group), key=_tokens)
    mates = [entry for entry in queue if entry is not leader and entry.group == leader.group]
    by_length = sorted(mates, key=_tokens)
    shorter = [entry for entry in sorted(mates, key=_tokens, reverse=True) if entry.tokens <= leader.tokens]
    longer = [entry for entry in by_length if entry.tokens > leader.tokens]
    batch = [leader]
    width = leader.tokens
    for entry in (*shorter, *longer):
        width_with = max(width, entry.tokens)
        if len(batch) == max_batch_size or width_with * (len(batch) + 1) > max_batch_tokens:
            break
        batch.append(entry)
        width = width_with
    return batch


def padded_tokens(batch: Sequence[Queued]) -> int:
    """Tokens of a batch when each sequence is padded to the longest."""
    return len(batch) * max(entry.tokens for entry in batch)


def _tokens(entry: Queued) -> int:
    return entry.tokens
