"""Cutting a request into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppod.client.delivery import SplitPolicy


@dataclass(frozen=True, slots=True)
class RowSizes:
    """What each sequence of a request weighs.

    Attributes:
        tokens: number of tokens; an estimate for text.
        wire_bytes: bytes in the request or in the reply, whichever is more.
    """

    tokens: Sequence[int]
    wire_bytes: Sequence[int]

    def total_tokens(self, rows: range) -> int:
        """Tokens of some of the sequences."""
        return sum(self.tokens[rows.start : rows.stop])


def split_rows(
    sizes: RowSizes, replicas: int, max_sequences: int | None, policy: SplitPolicy, most_tokens: int | None = None
) -> list[range]:
    """Cut the sequences of a request into consecutive parts; one part where that will do.

    Args:
        replicas: how many can work on the request.
        max_sequences: the server's limit for one request; None: not known.
        policy: how parts are cut.
        most_tokens: more in one request were refused; None: none were.
    """
    count = len(sizes.tokens)
    max_tokens = sum(sizes.tokens)
    if replicas > 1:
        # Twice as many parts as replicas, so that a slow one holds up less than half of its share.
        even = -(-max_tokens // (2 * replicas))
        max_tokens = min(max(even, policy.min_part_tokens), policy.max_part_tokens)
    if most_tokens is not None:
        max_tokens = min(max_tokens, most_tokens)
    max_rows = max_sequences or count
    parts: list[range] = []
    start = tokens = wire = 0
    for row in range(count):
        tokens += sizes.tokens[row]
        wire += sizes.wire_bytes[row]
        if row > start and (tokens > max_tokens or wire > policy.max_part_bytes or row - start >= max_rows):
            parts.append(range(start, row))
            start, tokens, wire = row, sizes.tokens[row], sizes.wire_bytes[row]
    parts.append(range(start, count))
    return parts
