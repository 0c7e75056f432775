"""Minibatches: every sample once, for any number of ranks; micro-batches within a budget of padded tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppod_trainer.config import PpoConfig
from ppod_trainer.minibatches import Minibatch, SampleLengths, plan_minibatches


def lengths_of(prompts: list[int], responses: list[int]) -> SampleLengths:
    return SampleLengths(np.array(prompts, dtype=np.int64), np.array(responses, dtype=np.int64))


def plan(lengths: SampleLengths, ranks: int = 1, **ppo: object) -> list[Minibatch]:
    return list(plan_minibatches(lengths, 0, 3, 1, PpoConfig.model_validate(ppo), ranks))


def rows_of(minibatch: Minibatch) -> list[list[list[int]]]:
    """Of each rank its micro-batches, each sorted."""
    return [[sorted(micro.tolist()) for micro in share] for share in minibatch.shares]


def test_similar_lengths_are_together_within_the_budget() -> None:
    # Widths of 10, 2, 3, 9, 2, 2: two of 10 make 20 padded tokens; of width 3 four make 12.
    lengths = lengths_of([5, 1, 1, 5, 1, 1], [5, 1, 2, 4, 1, 1])
    (only,) = plan(lengths, minibatches=1, micro_batch_tokens=20)
    assert rows_of(only) == [[[0, 3], [1, 2, 4, 5]]]
    # Padding is on both sides: 5 + 5 columns, not the longest sample's 6.
    crossed = lengths_of([5, 1], [1, 5])
    (only,) = plan(crossed, minibatches=1, micro_batch_tokens=19)
    assert len(rows_of(only)[0]) == 2
    (only,) = plan(crossed, minibatches=1, micro_batch_tokens=20)
    assert rows_of(only) == [[[0, 1]]]


def test_ranks_get_even_shares_of_what_one_micro_batch_could_hold() -> None:
    lengths = lengths_of([2] * 8, [3] * 8)
    (only,) = plan(lengths, ranks=4, minibatches=1, micro_batch_tokens=1000)
    assert [[len(micro) for micro in share] for share in only.shares] == [[2], [2], [2], [2]]


@given(
    samples=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40),
    minibatches=st.integers(1, 5),
    budget=st.integers(1, 400),
    ranks=st.integers(1, 5),
)
def test_every_sample_is_in_one_micro_batch(
    samples: list[tuple[int, int]], minibatches: int, budget: int, ranks: int
) -> None:
    lengths = lengths_of([one[0] for one in samples], [one[1] for one in samples])
    plain = plan(lengths, minibatches=minibatches)
    planned = plan(lengths, ranks, minibatches=minibatches, micro_batch_tokens=budget)
    assert [one.rows.tolist() for one in planned] == [one.rows.tolist() for one in plain], "the limits cut shares only"
    assert sorted(row for one in planned for row in one.rows.tolist()) == list(range(len(samples)))
    for one in planned:
        shares = rows_of(one)
        assert len(shares) == ranks
        assert len({len(share) for share in shares}) == 1, "ranks compute the same number of times"
        micros = [micro for share in shares for micro in share]
        assert sorted(row for micro in micros for row in micro) == sorted(one.rows.tolist())
        for micro in micros:
            assert len(micro) <= 1 or lengths.padded_tokens(np.array(micro)) <= budget
        assert sum(not micro for micro in micros) < ranks, "no rank idles while another computes twice"


@pytest.mark.parametrize(("ranks", "micro"), [(1, None), (3, None), (3, 2), (7, 1)])
def test_shares_by_count_hold_every_sample_once(ranks: int, micro: int | None) -> None:
    for one in plan(lengths_of([1] * 11, [1] * 11), ranks, minibatches=2, micro_batch_size=micro):
        shares = rows_of(one)
        assert len({len(share) for share in shares}) == 1
        micros = [part for share in shares for part in share]
        assert sorted(row for part in micros for row in part) == sorted(one.rows.tolist())
        assert micro is None or max(len(part) for part in micros) <= micro
