"""Who is prefilled next. Decides, and computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ppod.tensors import TokenArray
from ppod_services.generation.decoder import Prefill
from ppod_services.generation.rows import Row

_SPLIT_TOKENS = 64
"""Padding that is cheaper than one more forward."""
_MOST_PASSED = 8
"""Groups that go before a longer prompt: it would wait for ever where short ones keep coming."""


@dataclass(slots=True, eq=False)
class Arrival:
    """Completions of one prompt, which is run once for all of them.

    Attributes:
        prompt: int32 [length].
        rows: at least one.
        begun: the part of the prompt that was run already.
        passed: groups that went before it.
    """

    prompt: TokenArray
    rows: list[Row]
    begun: Prefill | None = None
    passed: int = 0

    @property
    def turn(self) -> tuple[int, int]:
        """Sorts by who goes first: who was passed over too often, then the shortest."""
        return -self.passed if self.passed >= _MOST_PASSED else 0, len(self.prompt)


class Arrivals:
    """Prompts that wait for their prefill."""

    def __init__(self) -> None:
        self._waiting: list[Arrival] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> Iterator[Row]:
        """All completions that wait."""
        return (row for arrival in self._waiting for row in arrival.rows)

    def add(self, row: Row) -> None:
        """Let a completion wait, beside its siblings where some wait."""
        for arrival in self._waiting:
            if arrival.prompt is row.item.prompt:
                arrival.rows.append(row)
                return
        self._waiting.append(Arrival(row.item.prompt, [row]))

    def drop(self, gone: Row) -> None:
        """A completion waits no longer."""
        for arrival in self._waiting:
            arrival.rows = [row for row in arrival.rows if row is not gone]
        self._waiting = [arrival for arrival in self._waiting if arrival.rows]

    def restart(self) -> None:
        """Forget what was run of prompts: the weights have changed."""
        for arrival in self._waiting:
            arrival.begun = None

    def next_group(self, most_tokens: int | None) -> list[Arrival]:
        """Take out prompts that are run together, with at most so many tokens, padding included; None: any number.

        Short ones go first, until a longer one was passed over too often. They go together while padding is cheap.
        Empty where the next one is longer than that: then it is `long_one`'s turn.
        """
        if self.begun is not None:
            return []
        self._waiting.sort(key=lambda arrival: arrival.turn)
        group: list[Arrival] = []
        width = tokens = 0
        for arrival in self._waiting:
            width = max(width, len(arrival.prompt))
            padded = width * (len(group) + 1)
            tokens += len(arrival.prompt)
            if most_tokens is not None and padded > most_tokens:
                break
            if padded - tokens > _SPLIT_TOKENS + tokens // 8:
                break
            group.append(arrival)
        del self._waiting[: len(group)]
        if group:
            for arrival in self._waiting:
                arrival.passed += 1
        return group

    @property
    def begun(self) -> Arrival | None:
        """The one whose prompt was run in part."""
        return next((arrival for arrival in self._waiting if arrival.begun is not None), None)

    @property
    def long_one(self) -> Arrival:
        """The one whose turn it is to be run in parts."""
        return self.begun or self._waiting[0]

    def take(self, arrival: Arrival) -> None:
        """Take one out."""
        self._waiting.remove(arrival)
