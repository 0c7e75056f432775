"""Decisions of an exchange: when it repeats, where it sends, what it never does. No network and no sleep."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod.client.delivery import NO_RETRY, Delivery, HedgePolicy, RetryPolicy, SplitPolicy
from ppod.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NonFiniteOutput,
    PpodError,
    ResourceExhausted,
    RewardFailed,
    Unavailable,
)
from unit.client.simulated_replicas import Answer, Behaviour, RowsJob, World, failing, good

GONE = Unavailable("gone")
SMALL = SplitPolicy(min_part_tokens=1, max_part_tokens=100)


def sequence_of(*behaviours: Behaviour) -> Behaviour:
    """Each call meets the next behaviour; the last one stays."""
    left = list(behaviours)

    def behave(payload: bytes, now: float) -> Answer:
        return (left.pop(0) if len(left) > 1 else left[0])(payload, now)

    return behave


def test_a_lone_request_is_one_attempt() -> None:
    world = World({"a": good(0.01)})
    job = RowsJob([5, 6, 7])
    world.exchange(job)
    assert [(each.address, each.payload) for each in world.sent] == [("a", b"0-3")]
    assert job.covered() == [0, 1, 2]


def test_backoff_is_full_jitter_and_doubles() -> None:
    retry = RetryPolicy(max_attempts=4, initial_backoff_s=1.0, max_backoff_s=3.0)
    world = World({"a": failing(GONE, 0.0)}, Delivery(retry=retry), seed=7)
    with pytest.raises(Unavailable):
        world.exchange(RowsJob([1]), timeout_s=100)
    rng = random.Random(7)
    waits = [rng.uniform(0, cap) for cap in (1.0, 2.0, 3.0)]
    found = [later.at - sooner.at for sooner, later in zip(world.sent, world.sent[1:], strict=False)]
    assert found == pytest.approx(waits)


def test_a_caller_that_repeats_until_its_deadline_may_do_so_for_long() -> None:
    class Highest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return max(a, b)

    retry = RetryPolicy(max_attempts=1_000_000, max_backoff_s=3.0)
    assert [retry.backoff_s(failures, Highest()) for failures in (1, 1_025, 999_999)] == [0.1, 3.0, 3.0]
    at_once = RetryPolicy(max_attempts=1_000_000, initial_backoff_s=0.0)
    assert [at_once.backoff_s(failures, Highest()) for failures in (1, 1_025)] == [0.0, 0.0]


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("f", "x", "y"),
        FailedPrecondition("tokenizer", "x", "y"),
        FailedPrecondition("weight_version", "1", "2"),
        Internal("bug"),
        DeadlineExceeded("late"),
        NonFiniteOutput("score", 0, "nan"),
        ResourceExhausted("message larger than max", 0.0),
    ],
)
def test_what_no_repeat_can_mend_is_raised_at_once(error: PpodError) -> None:
    world = World({"a": failing(error)})
    with pytest.raises(type(error)):
        world.exchange(RowsJob([1]))
    assert len(world.sent) == 1


def test_no_wait_outlasts_the_deadline() -> None:
    """One replica asks for a longer wait than there is time for, and the other one goes away."""
    world = World({"a": failing(ResourceExhausted("full", 60.0)), "b": failing(GONE)})
    with pytest.raises(Unavailable, match="gone"):
        world.exchange(RowsJob([1]), timeout_s=10)
    assert world.now < 10
    assert world.addresses() == ["a", *["b"] * 5]


def test_who_is_back_is_asked_before_who_wants_too_long_a_wait() -> None:
    world = World({"a": failing(ResourceExhausted("full", 60.0)), "b": sequence_of(failing(GONE), good(0.1))})
    job = RowsJob([1])
    world.exchange(job, timeout_s=10)
    assert job.covered() == [0]
    assert world.addresses() == ["a", "b", "b"]
    assert world.now < 1


def test_what_may_not_be_done_twice_is_repeated_only_when_it_was_refused() -> None:
    world = World({"a": failing(GONE), "b": good(0.1)})
    with pytest.raises(Unavailable):
        world.exchange(RowsJob([1], repeatable=False))
    assert len(world.sent) == 1
    world = World({"a": sequence_of(failing(ResourceExhausted("full", 0.5)), good(0.1))})
    world.exchange(RowsJob([1], repeatable=False))
    assert len(world.sent) == 2


def test_no_attempt_sooner_than_told() -> None:
    world = World({"a": sequence_of(failing(ResourceExhausted("full", 2.0), 0.5), good(0.1))})
    world.exchange(RowsJob([1]))
    first, second = world.sent
    assert 2.5 <= second.at - first.at <= 2.6 + 1e-9


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    world = World({"a": failing(ResourceExhausted("full", 2.0), 0.5)})
    with pytest.raises(ResourceExhausted):
        world.exchange(RowsJob([1]), timeout_s=2.4)
    assert len(world.sent) == 1
    assert world.now == pytest.approx(0.5)


def test_one_deadline_for_all_attempts() -> None:
    """`World` checks that every attempt gets exactly what is left."""
    retry = RetryPolicy(max_attempts=100, initial_backoff_s=0.2, multiplier=1.0)
    world = World({"a": failing(GONE, 0.1)}, Delivery(retry=retry))
    with pytest.raises((Unavailable, DeadlineExceeded)):
        world.exchange(RowsJob([1]), timeout_s=3.0)
    assert len(world.sent) > 5
    assert 2.5 < world.now <= 3.0


def test_one_other_replica_is_asked_after_a_refusal() -> None:
    refusing = failing(ResourceExhausted("full", 1.0), 0.0)
    world = World({"a": refusing, "b": refusing, "c": refusing, "d": refusing})
    with pytest.raises(ResourceExhausted):
        world.exchange(RowsJob([1]), timeout_s=0.9)
    assert len(world.sent) == 2, "refusals mean load: a storm of repeats would add to it"


def test_a_request_pinned_to_a_version_finds_the_replica_that_has_it() -> None:
    stale = failing(FailedPrecondition("weight_version", "1", "2"), 0.0)
    world = World({"a": stale, "b": stale, "c": good(0.01, 2)})
    world.exchange(RowsJob([1]))
    assert world.addresses() == ["a", "b", "c"]


@pytest.mark.parametrize(("version", "addresses"), [(2, ["a", "b", "a"]), (1, ["a", "b"])])
def test_a_part_that_is_refused_goes_to_who_answered_another_with_the_version(
    version: int, addresses: list[str]
) -> None:
    stale = failing(FailedPrecondition("weight_version", "1", "2"), 0.02)
    world = World({"a": good(0.01, version), "b": stale}, Delivery(split=SplitPolicy(10, 10)))
    job = RowsJob([10, 10])
    if version == 2:
        world.exchange(job)
        assert job.covered() == [0, 1]
    else:
        with pytest.raises(FailedPrecondition):
            world.exchange(job)
    assert world.addresses() == addresses


class TestSplitting:
    def test_work_follows_speed(self) -> None:
        """The fast replica takes the parts that the slow one does not get to; all rows arrive once, in order."""
        world = World({"slow": good(1.0), "fast": good(0.1)}, Delivery(split=SplitPolicy(10, 10, straggler_factor=50)))
        job = RowsJob([10] * 20)
        world.exchange(job)
        assert job.covered() == list(range(20))
        assert world.addresses().count("slow") == 2, "two in flight, and both out for a second"
        assert world.addresses().count("fast") == 18

    def test_one_replica_gets_parts_only_beyond_the_limits(self) -> None:
        world = World({"a": good(0.1)})
        job = RowsJob([10] * 25)
        world.exchange(job, max_sequences=10)
        assert [each.payload for each in world.sent] == [b"0-10", b"10-20", b"20-25"]
        assert world.sent[2].at == pytest.approx(0.1), "two in flight"

    def test_an_error_names_the_sample_of_the_whole_request(self) -> None:
        for error in (
            InvalidArgument("f", "x", "y", 3),
            NonFiniteOutput("score", 3, "nan"),
            RewardFailed("judge", "x", "y", 3),
        ):

            def behave(payload: bytes, _: float, error: PpodError = error) -> Answer:
                start = int(payload.split(b"-")[0])
                return (0.1, error) if start == 20 else (0.05, payload + b"@0")

            world = World({"a": behave})
            with pytest.raises(type(error)) as caught:
                world.exchange(RowsJob([1] * 30), max_sequences=10)
            assert caught.value.sample == 23  # pyright: ignore

    def test_a_straggler_is_sent_again_once_and_only_to_an_idle_replica(self) -> None:
        stuck = sequence_of(good(0.1), good(60.0))
        split = SplitPolicy(10, 10, parts_in_flight=1)
        world = World({"a": stuck, "b": good(0.1)}, Delivery(split=split))
        job = RowsJob([10] * 6)
        world.exchange(job, timeout_s=100)
        assert job.covered() == list(range(6))
        repeated = [each for each in world.sent if each.payload == world.sent[2].payload]
        assert [each.address for each in repeated] == ["a", "b"]
        # Parts take 0.1 s, so one is late after 0.3.
        assert world.now < 1.0
        assert world.cancelled == 1

    def test_a_replica_that_dies_loses_nothing(self) -> None:
        world = World(
            {"a": sequence_of(good(0.1), failing(GONE)), "b": good(0.1), "c": good(0.1)}, Delivery(split=SMALL)
        )
        job = RowsJob([7] * 40)
        world.exchange(job)
        assert job.covered() == list(range(40))


class TestVersions:
    def test_parts_from_older_weights_are_asked_again(self) -> None:
        """Replica b was updated while the request ran: a's parts are answered by b in the end."""
        world = World({"a": good(0.1, 4), "b": good(0.1, 5)}, Delivery(split=SMALL))
        job = RowsJob([10] * 8)
        world.exchange(job)
        first, again = world.sent[:4], world.sent[4:]
        assert [each.address for each in again] == ["b"] * 2
        assert {each.payload for each in again} == {each.payload for each in first if each.address == "a"}

    def test_a_mixture_is_never_returned(self) -> None:
        def flapping(payload: bytes, now: float) -> Answer:
            return (0.1, payload + f"@{int(now * 10) + int(payload.split(b'-')[0])}".encode())

        world = World({"a": flapping, "b": flapping}, Delivery(split=SMALL))
        with pytest.raises((FailedPrecondition, Unavailable)):
            world.exchange(RowsJob([10] * 8))


class TestHedging:
    def test_a_late_answer_is_overtaken(self) -> None:
        hedge = HedgePolicy(delay_s=0.2, max_extra_fraction=1.0)
        world = World({"a": good(5.0), "b": good(0.1)}, Delivery(hedge=hedge))
        world.exchange(RowsJob([1]))
        assert [(each.address, each.at) for each in world.sent] == [("a", 0.0), ("b", pytest.approx(0.2))]
        assert world.now == pytest.approx(0.3)
        assert world.cancelled == 1

    def test_the_budget_bounds_the_extra_load(self) -> None:
        hedge = HedgePolicy(delay_s=0.01, max_extra_fraction=0.05)
        world = World({"a": good(0.1), "b": good(0.1)}, Delivery(hedge=hedge))
        for _ in range(400):
            world.exchange(RowsJob([1]))
        assert len(world.sent) == 420, "5%"

    def test_the_delay_is_the_95th_percentile_of_requests_of_the_size(self) -> None:
        world = World({"a": good(0.1), "b": good(0.1)}, Delivery(hedge=HedgePolicy(max_extra_fraction=1.0)))
        for index in range(100):
            world.replicas["a"] = world.replicas["b"] = good(0.001 * (index + 1))
            world.exchange(RowsJob([10]))
        assert world.cancelled == 0 or len(world.sent) < 200
        world.replicas["a"] = world.replicas["b"] = good(9.0)
        p95 = world.shared.latencies.p95_s(10)
        assert p95 is not None
        start, before = world.now, len(world.sent)
        world.exchange(RowsJob([10]), timeout_s=100)
        assert world.sent[before + 1].at - start == pytest.approx(p95)
        before = len(world.sent)
        world.exchange(RowsJob([1000]), timeout_s=100)
        assert len(world.sent) == before + 1, "nothing is known of requests of this size"

    def test_never_to_the_same_replica_nor_what_may_not_run_twice(self) -> None:
        hedge = HedgePolicy(delay_s=0.01, max_extra_fraction=1.0)
        lone = World({"a": good(0.5)}, Delivery(hedge=hedge))
        lone.exchange(RowsJob([1]))
        assert len(lone.sent) == 1
        twice = World({"a": good(0.5), "b": good(0.5)}, Delivery(hedge=hedge))
        twice.exchange(RowsJob([1], repeatable=False))
        assert len(twice.sent) == 1

    def test_a_part_that_the_budget_does_not_hedge_is_sent_to_an_idle_replica_all_the_same(self) -> None:
        """As it is without hedging; else it would be waited for until the deadline."""
        delivery = Delivery(split=SMALL, hedge=HedgePolicy(delay_s=0.2, max_extra_fraction=0.05))
        world = World({"a": good(1_000), "b": good(0.1), "c": good(0.1)}, delivery)
        world.exchange(RowsJob([100] * 6), timeout_s=60)
        assert world.now == pytest.approx(0.4), "three times what its size predicts, and the time of an answer"
        assert world.cancelled == 2

    def test_a_failed_hedge_leaves_the_first_attempt_to_its_answer(self) -> None:
        hedge = HedgePolicy(delay_s=0.01, max_extra_fraction=1.0)
        world = World({"a": good(0.5), "b": failing(GONE)}, Delivery(retry=NO_RETRY, hedge=hedge))
        world.exchange(RowsJob([1]))
        assert world.now == pytest.approx(0.5)


ERRORS = [GONE, ResourceExhausted("full", 0.3), ResourceExhausted("quota", 1.5)]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(0, 4)), min_size=1, max_size=60),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_whatever_happens_each_row_comes_once_or_an_error_does(
    tokens: list[int], replicas: int, script: list[tuple[float, int]], hedging: bool
) -> None:
    """Random latencies and failures. `World` checks deadlines, that nothing waits for ever, and that no token leaks."""
    told: dict[tuple[str, bytes], float] = {}
    world: World

    def scripted(address: str) -> Behaviour:
        left = list(script)

        def behave(payload: bytes, now: float) -> Answer:
            assert now >= told.get((address, payload), 0.0) - 1e-9, "sooner than told"
            seconds, kind = left.pop(0) if left else (0.01, 4)
            if kind >= len(ERRORS):
                return seconds, payload + b"@0"
            error = ERRORS[kind]
            if isinstance(error, ResourceExhausted):
                told[address, payload] = now + seconds + error.retry_after_s
            return seconds, error

        return behave

    hedge = HedgePolicy(delay_s=0.1, max_extra_fraction=0.5) if hedging else None
    names = "abcd"[:replicas]
    retry = RetryPolicy(max_attempts=6)
    world = World({name: scripted(name) for name in names}, Delivery(retry=retry, hedge=hedge, split=SMALL))
    job = RowsJob(tokens)
    try:
        world.exchange(job, timeout_s=30.0, max_sequences=7)
    except (Unavailable, ResourceExhausted, DeadlineExceeded):
        return
    assert job.covered() == list(range(len(tokens)))
