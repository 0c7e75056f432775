"""Whose prompt is run next, while more of them come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np

from ppod_services.generation.arrivals import Arrivals
from ppod_services.generation.rows import Row

MOST_TOKENS = 16


def add(arrivals: Arrivals, length: int) -> None:
    prompt = np.arange(length, dtype=np.int32)
    arrivals.add(cast(Row, SimpleNamespace(item=SimpleNamespace(prompt=prompt))))


def lengths(arrivals: Arrivals) -> list[int]:
    return [len(arrival.prompt) for arrival in arrivals.next_group(MOST_TOKENS)]


def test_short_ones_go_first_and_together() -> None:
    arrivals = Arrivals()
    for length in (10, 3, 40, 4):
        add(arrivals, length)
    assert lengths(arrivals) == [3, 4]
    assert lengths(arrivals) == [10]
    assert lengths(arrivals) == []
    assert len(arrivals.long_one.prompt) == 40


def test_a_long_one_gets_its_turn_while_short_ones_keep_coming() -> None:
    arrivals = Arrivals()
    add(arrivals, 40)
    for _ in range(8):
        add(arrivals, 3)
        assert lengths(arrivals) == [3]
    add(arrivals, 3)
    assert lengths(arrivals) == []
    assert len(arrivals.long_one.prompt) == 40
    arrivals.take(arrivals.long_one)
    assert lengths(arrivals) == [3]


def test_those_that_are_overdue_go_alone() -> None:
    """Beside shorter ones, which would be padded to them; and never more than fit."""
    arrivals = Arrivals()
    add(arrivals, 7)
    add(arrivals, 12)
    for _ in range(8):
        for _ in range(4):
            add(arrivals, 4)
        assert lengths(arrivals) == [4, 4, 4, 4]
    add(arrivals, 4)
    assert [lengths(arrivals) for _ in range(3)] == [[7], [12], [4]]
    assert not len(arrivals)


def test_who_has_waited_longest_goes_first_where_all_are_overdue() -> None:
    """As in a backlog: the shortest of many that are overdue would else go before a long one for ever."""
    arrivals = Arrivals()
    add(arrivals, 40)
    for _ in range(12):
        for _ in range(6):
            add(arrivals, 3)
        if not (group := lengths(arrivals)):
            break
        assert group == [3] * 5
    assert len(arrivals.long_one.prompt) == 40
