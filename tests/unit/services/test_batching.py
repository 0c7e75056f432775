"""Batch formation: bounds, order, groups, determinism."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import pytest

from ppod_services.core.batching import form_batch, padded_tokens


@dataclass(frozen=True, eq=False)
class Entry:
    tokens: int
    request: int = 0
    group: Hashable = None

    def same_request(self, other: object) -> bool:
        return isinstance(other, Entry) and other.request == self.request


def lengths(batch: list[Entry]) -> list[int]:
    return [entry.tokens for entry in batch]


def test_a_lone_request_is_cut_longest_first_within_the_budget() -> None:
    queue = [Entry(tokens) for tokens in (3, 9, 4, 10, 2)]
    batches: list[list[int]] = []
    while queue:
        batch = form_batch(queue, max_batch_tokens=20, max_batch_size=8)
        queue = [entry for entry in queue if entry not in batch]
        batches.append(lengths(batch))
    # 10 + 9 pad to 20; then 4, 3 and 2 pad to 12.
    assert batches == [[10, 9], [4, 3, 2]]


def test_ties_keep_their_order() -> None:
    queue = [Entry(5) for _ in range(4)]
    assert form_batch(queue, 100, 3) == queue[:3]


def test_size_bound() -> None:
    assert len(form_batch([Entry(1) for _ in range(9)], 1000, 4)) == 4


def test_a_sequence_beyond_the_budget_runs_alone() -> None:
    assert lengths(form_batch([Entry(50), Entry(1)], 10, 8)) == [50]


def test_the_oldest_request_leads_and_longer_mates_join_only_within_the_budget() -> None:
    queue = [Entry(4, request=0), Entry(30, request=1), Entry(5, request=1), Entry(6, request=2)]
    batch = form_batch(queue, max_batch_tokens=18, max_batch_size=8)
    assert lengths(batch) == [4, 5, 6]
    assert padded_tokens(batch) == 18


def test_groups_do_not_mix() -> None:
    queue = [Entry(4, group="a"), Entry(4, group="b"), Entry(3, group="a")]
    assert [entry.group for entry in form_batch(queue, 100, 8)] == ["a", "a"]


@pytest.mark.parametrize("budget", [16, 37, 64])
def test_batches_never_exceed_the_padded_budget(budget: int) -> None:
    queue = [Entry(1 + (7 * index) % 16, request=index % 3) for index in range(60)]
    seen = 0
    while queue:
        batch = form_batch(queue, budget, 8)
        assert padded_tokens(batch) <= budget
        queue = [entry for entry in queue if entry not in batch]
        seen += len(batch)
    assert seen == 60
