"""The queue: bounds of batches, order, groups, priorities, fairness between teams, determinism, cost."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_services.core.batching import BatchBounds, computed_tokens
from ppod_services.core.callers import Caller, Priority, Team
from ppod_services.core.fair_queue import FairQueue

ROOMY = BatchBounds(max_tokens=10**6, max_size=10**6, overhead_tokens=10**6)
A, B = Team("a"), Team("b")
ONE = BatchBounds(10**6, max_size=1, overhead_tokens=10**6)


@dataclass(frozen=True, eq=False)
class Entry:
    tokens: int
    group: Hashable = None
    owner: str = ""
    packed: bool = False


def queue_of(*requests: Sequence[int], catch_up_tokens: int = 0) -> FairQueue[Entry]:
    """One team's requests, each by the lengths of its sequences."""
    queue: FairQueue[Entry] = FairQueue(catch_up_tokens)
    for number, lengths in enumerate(requests):
        queue.add(number, Caller(A), [Entry(tokens) for tokens in lengths], 0.0)
    return queue


def put(
    queue: FairQueue[Entry], team: Team, *lengths: int, priority: Priority = Priority.NORMAL, now_s: float = 0.0
) -> object:
    key = object()
    queue.add(key, Caller(team, priority), [Entry(tokens, owner=team.name) for tokens in lengths], now_s)
    return key


def bounds(max_tokens: int, max_size: int = 10**6, overhead_tokens: int = 10**6) -> BatchBounds:
    return BatchBounds(max_tokens, max_size, overhead_tokens)


def lengths(batch: list[Entry]) -> list[int]:
    return [entry.tokens for entry in batch]


def owners(batch: list[Entry]) -> list[str]:
    return [entry.owner for entry in batch]


def drain(queue: FairQueue[Entry], limits: BatchBounds) -> list[list[int]]:
    batches: list[list[int]] = []
    while len(queue):
        batches.append(lengths(queue.take(limits)))
    return batches


def test_a_lone_request_is_cut_longest_first_within_the_budget() -> None:
    # 10 + 9 pad to 20; then 4, 3 and 2 pad to 12.
    assert drain(queue_of([3, 9, 4, 10, 2]), bounds(20, 8)) == [[10, 9], [4, 3, 2]]


def test_ties_keep_their_order() -> None:
    entries = [Entry(5) for _ in range(4)]
    queue: FairQueue[Entry] = FairQueue(0)
    queue.add(0, Caller(A), entries, 0.0)
    assert queue.take(bounds(100, 3)) == entries[:3]
    assert queue.take(bounds(100, 3)) == entries[3:]


def test_a_sequence_beyond_the_budget_runs_alone() -> None:
    assert lengths(queue_of([50, 1]).take(bounds(10, 8))) == [50]


def test_the_oldest_request_leads_and_longer_mates_join_only_within_the_budget() -> None:
    batch = queue_of([4], [30, 5], [6]).take(bounds(18, 8))
    assert lengths(batch) == [4, 5, 6]
    assert computed_tokens(batch) == 18


def packed_queue(*requests: Sequence[int]) -> FairQueue[Entry]:
    queue: FairQueue[Entry] = FairQueue(0)
    for number, lengths in enumerate(requests):
        queue.add(number, Caller(A), [Entry(tokens, packed=True) for tokens in lengths], 0.0)
    return queue


def test_a_packed_batch_is_filled_to_the_token_by_requests_in_their_order() -> None:
    # Padding would forbid 1 beside 30; packed, 30 + 1 + 12 + 7 = 50. The last place goes to the longest that fits.
    queue = packed_queue([30], [1], [12], [9], [7], [3])
    batch = queue.take(bounds(50, overhead_tokens=0))
    assert lengths(batch) == [30, 1, 12, 7]
    assert computed_tokens(batch) == 50
    assert lengths(queue.take(bounds(50, overhead_tokens=0))) == [9, 3]


def test_a_packed_batch_holds_its_bounds() -> None:
    assert lengths(packed_queue([5, 5, 5, 5]).take(bounds(100, max_size=3))) == [5, 5, 5]
    assert lengths(packed_queue([200], [1]).take(bounds(100))) == [200]
    assert lengths(packed_queue([60], [50], [40]).take(bounds(100))) == [60, 40]


def test_the_mate_that_needs_the_least_padding_comes_first() -> None:
    # Beside 10: 11 pads one token, 8 two; beside [10, 11] then 8 pads three and 20 eighteen.
    assert lengths(queue_of([10], [8], [20], [11]).take(bounds(33))) == [10, 11, 8]


def test_padding_that_costs_more_than_a_batch_is_refused() -> None:
    # 100 and 60 pad to 200, 40 wasted: within 30 + 200 // 16 = 42. A second 60 would make it 80, beyond 30 + 18.
    assert drain(queue_of([100, 60, 60]), bounds(10**6, overhead_tokens=30)) == [[100, 60], [60]]


def test_groups_do_not_mix() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    queue.add(0, Caller(A), [Entry(4, "x"), Entry(4, "y"), Entry(3, "x")], 0.0)
    assert [entry.group for entry in queue.take(ROOMY)] == ["x", "x"]
    assert [entry.group for entry in queue.take(ROOMY)] == ["y"]


def test_priorities_are_strict_within_a_team() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    put(queue, A, 1, priority=Priority.LOW)
    put(queue, A, 2, priority=Priority.NORMAL)
    put(queue, A, 3, priority=Priority.HIGH)
    assert drain(queue, bounds(10**6, max_size=1)) == [[3], [2], [1]]


def test_a_high_priority_does_not_push_another_team_back() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    put(queue, A, 5, 5, priority=Priority.HIGH)
    put(queue, B, 5, 5, priority=Priority.LOW)
    assert [owners(queue.take(ONE)) for _ in range(4)] == [["a"], ["b"], ["a"], ["b"]]


def test_weights_divide_the_tokens() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    put(queue, Team("heavy", weight=3.0), *[10] * 8)
    put(queue, Team("light"), *[10] * 8)
    # Counters by turns: heavy 10/3, light 10, heavy 20/3 and 10; the tie goes to the team that came first.
    assert owners(queue.take(bounds(10**6, max_size=8))) == [
        "heavy",
        "light",
        "heavy",
        "heavy",
        "heavy",
        "light",
        "heavy",
        "heavy",
    ]


def test_a_team_that_comes_back_has_no_claim_on_what_it_left_unused() -> None:
    """The paper's rule: without it, b would be served 1,000 tokens before a gets one more."""
    queue: FairQueue[Entry] = FairQueue(catch_up_tokens=0)
    put(queue, B, 10)
    put(queue, A, *[10] * 101)
    for _ in range(101):
        queue.take(ONE)
    put(queue, A, *[10] * 4)
    put(queue, B, *[10] * 4)
    assert sorted(owner for _ in range(4) for owner in owners(queue.take(ONE))) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(("team", "served"), [(B, "bbbbabab"), (Team("b", weight=2.0), "bbbbabba")])
def test_a_team_that_comes_back_catches_up_as_far_as_it_may(team: Team, served: str) -> None:
    queue: FairQueue[Entry] = FairQueue(catch_up_tokens=30)
    put(queue, team, 10)
    assert queue.tokens_behind(team) == 0
    put(queue, A, *[10] * 100)
    for _ in range(91):
        queue.take(ONE)
    assert queue.tokens_behind(team) == 30, "before it comes back, too: admission asks then"
    put(queue, team, *[10] * 10)
    assert queue.tokens_behind(team) == 30
    # 30 tokens to catch up, then by turns; a tie goes to a team that was there first, which is b.
    assert "".join(owners(queue.take(ONE))[0] for _ in range(8)) == served


def test_a_team_that_was_away_for_long_has_nothing_to_catch_up() -> None:
    """Else the first flood after a quiet hour would push a steady team aside."""
    queue: FairQueue[Entry] = FairQueue(catch_up_tokens=30)
    put(queue, B, 10)
    put(queue, A, *[10] * 100)
    for _ in range(91):
        queue.take(ONE)
    put(queue, B, *[10] * 10, now_s=30.1)
    assert queue.tokens_behind(B) == 0
    assert sorted(owners(queue.take(ONE))[0] for _ in range(8)) == ["a"] * 4 + ["b"] * 4


def test_removing_a_request_takes_all_of_it_and_nothing_else() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    gone = put(queue, A, 5, 7, 6)
    put(queue, A, 8)
    assert queue.team_tokens("a") == 26
    assert lengths(queue.remove(gone)) == [5, 7, 6]
    assert queue.remove(gone) == []
    assert (queue.tokens, len(queue), queue.requests, queue.team_tokens("a"), queue.team_sequences("a")) == (
        8,
        1,
        1,
        8,
        1,
    )
    assert drain(queue, ROOMY) == [[8]]


def test_a_request_can_be_removed_when_a_part_of_it_ran() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    key = put(queue, A, 5, 7, 6)
    assert lengths(queue.take(bounds(7))) == [7]
    assert lengths(queue.remove(key)) == [5, 6]
    assert (len(queue), queue.tokens) == (0, 0)


def test_share_is_among_those_who_wait() -> None:
    queue: FairQueue[Entry] = FairQueue(0)
    assert queue.share(A) == 1
    put(queue, Team("c", weight=3.0), 1)
    assert queue.share(A) == 0.25


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(list(Priority)),
        st.lists(st.tuples(st.integers(1, 40), st.sampled_from("xy")), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=25,
)


def filled(requests: list[tuple[str, Priority, list[tuple[int, str]]]], catch_up: int) -> FairQueue[Entry]:
    queue: FairQueue[Entry] = FairQueue(catch_up)
    for number, (team, priority, sequences) in enumerate(requests):
        weight = {"a": 1.0, "b": 2.0, "c": 0.5}[team]
        entries = [Entry(tokens, group, team) for tokens, group in sequences]
        queue.add(number, Caller(Team(team, weight=weight), priority), entries, 0.0)
    return queue


@given(REQUESTS, st.integers(1, 120), st.integers(1, 8), st.integers(0, 50))
def test_every_sequence_runs_once_within_the_bounds(
    requests: list[tuple[str, Priority, list[tuple[int, str]]]], budget: int, size: int, overhead: int
) -> None:
    queue = filled(requests, catch_up=10)
    count, tokens = len(queue), queue.tokens
    seen: list[Entry] = []
    while len(queue):
        batch = queue.take(bounds(budget, size, overhead))
        assert batch
        assert len({entry.group for entry in batch}) == 1
        assert len(batch) <= size
        assert len(batch) == 1 or computed_tokens(batch) <= budget
        waste = computed_tokens(batch) - sum(entry.tokens for entry in batch)
        assert waste <= overhead + computed_tokens(batch) // 16
        seen += batch
        assert len(queue) == count - len(seen)
        assert queue.tokens == tokens - sum(entry.tokens for entry in seen)
    assert len({id(entry) for entry in seen}) == count
    assert queue.requests == 0


@given(REQUESTS, st.integers(1, 120), st.integers(1, 8))
def test_the_batches_depend_on_the_queue_alone(
    requests: list[tuple[str, Priority, list[tuple[int, str]]]], budget: int, size: int
) -> None:
    limits = bounds(budget, size, 64)
    assert drain(filled(requests, 10), limits) == drain(filled(requests, 10), limits)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 50), min_size=60, max_size=60),
    st.lists(st.integers(1, 50), min_size=60, max_size=60),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(1, 5),
)
def test_the_fairness_bound_of_virtual_token_counters(
    own: list[int], others: list[int], weight: float, size: int
) -> None:
    """While both have work, service by weight differs by no more than the dearest sequence of each, after any batch.

    One sequence of the leader may start a batch whose length nobody else's fits; hence the sum, not the maximum.
    """
    queue: FairQueue[Entry] = FairQueue(0)
    teams = {"a": Team("a", weight=weight), "b": Team("b")}
    for tokens in own:
        put(queue, teams["a"], tokens)
    for tokens in others:
        put(queue, teams["b"], tokens)
    served = {"a": 0.0, "b": 0.0}
    bound = max(own) / weight + max(others)
    while queue.team_tokens("a") and queue.team_tokens("b"):
        # Any length may join any other: what padding forbids is another matter.
        for entry in queue.take(bounds(10**6, size)):
            served[entry.owner] += entry.tokens / teams[entry.owner].weight
        if queue.team_tokens("a") and queue.team_tokens("b"):
            assert abs(served["a"] - served["b"]) <= bound


@given(st.integers(1, 400), st.integers(0, 200))
def test_catching_up_is_bounded(flood: int, catch_up: int) -> None:
    """However long b was away, once back it gets at most `catch_up` and a sequence more than a."""
    queue: FairQueue[Entry] = FairQueue(catch_up)
    put(queue, B, 10)
    put(queue, A, *[10] * (flood + 100))
    for _ in range(flood + 1):
        queue.take(ONE)
    put(queue, B, *[10] * 80)
    served = {"a": 0, "b": 0}
    while queue.team_tokens("a") and queue.team_tokens("b"):
        for entry in queue.take(ONE):
            served[entry.owner] += entry.tokens
        assert served["b"] - served["a"] <= catch_up + 10 + 10


def test_a_flood_does_not_make_the_queue_slow() -> None:
    """50,000 waiting: sorting them for each batch would take tens of milliseconds; a batch of 64 takes under one."""
    queue: FairQueue[Entry] = FairQueue(0)
    keys = [put(queue, Team(f"team-{number % 5}"), *[1 + number * 7 % 512] * 10) for number in range(5_000)]
    start = time.process_time()
    for key in keys[:1_000]:
        queue.remove(key)
    removed_s = (time.process_time() - start) / 10_000
    start = time.process_time()
    for _ in range(200):
        assert len(queue.take(BatchBounds(2**24, 64, 64))) >= 32
    taken_s = (time.process_time() - start) / 200
    # Five to ten times what a quiet machine takes.
    assert removed_s < 50e-6
    assert taken_s < 5e-3


@pytest.mark.parametrize("teams", [1, 3])
def test_nobody_starves(teams: int) -> None:
    """An old, long, lonely sequence leads in the end, however many short ones keep coming."""
    queue: FairQueue[Entry] = FairQueue(0)
    put(queue, A, 500)
    for number in range(20):
        put(queue, Team("abc"[number % teams]), *[1] * 8)
    for turn in range(10):
        if 500 in lengths(queue.take(bounds(8))):
            assert turn == 0
            return
    pytest.fail("the long sequence never ran")


def timed(*requests: tuple[int, float, float]) -> FairQueue[Entry]:
    """One team's requests of one sequence each: length, arrival and expiry."""
    queue: FairQueue[Entry] = FairQueue(0)
    for number, (tokens, arrived_s, expires_s) in enumerate(requests):
        queue.add(number, Caller(A), [Entry(tokens)], arrived_s, expires_s)
    return queue


def test_an_urgent_request_goes_before_those_of_the_right_length() -> None:
    """At 6 s the one of 30 tokens has had half of its 10 s; the leader's own length would win otherwise."""
    requests = [(10, 0.0, 100.0), (10, 1.0, 100.0), (30, 1.0, 11.0), (10, 2.0, 100.0)]
    assert lengths(timed(*requests).take(bounds(20), 5.9)) == [10, 10]
    assert lengths(timed(*requests).take(bounds(20), 6.0)) == [30]


def test_of_urgent_requests_those_that_expire_first_go_first() -> None:
    queue = timed((10, 0.0, 9.0), (12, 0.0, 8.0), (11, 0.0, 7.0), (11, 6.0, 99.0))
    assert [lengths(queue.take(bounds(24), 6.0)) for _ in range(2)] == [[11, 12], [10, 11]]
    # Of 20 and 30, which expires first, only 20 has had half of its time at 6.5 s.
    queue = timed((10, -1.0, 600.0), (20, 2.0, 10.0), (30, 6.0, 8.0))
    assert [lengths(queue.take(bounds(1), at)) for at in (6.5, 7.5)] == [[20], [30]]


def test_an_urgent_request_joins_a_batch_only_within_the_price_of_padding() -> None:
    queue = timed((10, 0.0, 7.0), (200, 0.0, 8.0), (10, 5.0, 99.0))
    assert lengths(queue.take(bounds(1_000, overhead_tokens=8), 6.0)) == [10, 10]


def test_a_request_that_is_alone_is_batched_as_ever_however_late_it_is() -> None:
    lone: list[list[int]] = []
    for now_s in (0.0, 99.0):
        queue: FairQueue[Entry] = FairQueue(0)
        queue.add("lone", Caller(A), [Entry(tokens) for tokens in (3, 9, 4, 8)], 0.0, 100.0)
        lone.append(lengths(queue.take(bounds(18), now_s)))
    assert lone == [[9, 8], [9, 8]]


def test_what_expires_leaves_and_the_rest_stays() -> None:
    queue = timed((10, 0.0, 5.0), (20, 0.0, 6.0), (30, 0.0, 7.0))
    assert lengths(queue.expire(6.0)) == [10, 20]
    assert (len(queue), queue.tokens, queue.expire(6.0)) == (1, 30, [])
    assert lengths(queue.take(ROOMY, 6.0)) == [30]
