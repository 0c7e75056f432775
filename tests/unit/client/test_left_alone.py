"""Replicas that do not answer are left alone: which, for how long, and what ends it. No network and no sleep."""

from __future__ import annotations

import pytest

from ppod.client.delivery import Delivery, SplitPolicy
from ppod.errors import DeadlineExceeded, Unavailable
from unit.client.simulated_replicas import RowsJob, World, failing, good

GONE = Unavailable("gone")
SMALL = SplitPolicy(min_part_tokens=1, max_part_tokens=100)


def test_a_dead_replica_costs_no_wait_and_is_left_alone() -> None:
    world = World({"a": failing(GONE, 0.0), "b": good(0.01)})
    for _ in range(10):
        world.exchange(RowsJob([1]))
    assert world.now == pytest.approx(0.1)
    assert world.addresses() == ["a"] + ["b"] * 10


def test_a_replica_that_is_back_works_again() -> None:
    world = World({"a": failing(GONE, 0.0), "b": good(0.01)})
    world.exchange(RowsJob([1]))
    assert world.shared.replicas.due_probes(world.now) == []
    assert world.shared.replicas.due_probes(world.now + 0.5) == ["a"]
    assert world.shared.replicas.due_probes(world.now + 0.6) == [], "one probe at a time"
    world.replicas["a"] = good(0.01)
    world.shared.replicas.mark_up("a")
    for _ in range(4):
        world.exchange(RowsJob([1]))
    assert set(world.addresses()[-4:]) == {"a", "b"}


def test_probes_become_rarer() -> None:
    world = World({"a": good(1), "b": good(1)})
    replicas, now, waits = world.shared.replicas, 0.0, []
    for _ in range(7):
        replicas.mark_down("a", now)
        start = now
        while not replicas.due_probes(now):
            now += 0.25
        waits.append(now - start)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def ask(world: World, times: int) -> None:
    for _ in range(times):
        world.exchange(RowsJob([1]), timeout_s=5.0)


def test_a_replica_that_hangs_is_left_alone_for_ever_longer() -> None:
    """Its health may say that it serves, as where its model alone hangs."""
    world, waits = World({"a": good(1_000), "b": good(0.01)}), list[float]()
    replicas = world.shared.replicas
    for _ in range(6):
        with pytest.raises(DeadlineExceeded):
            ask(world, times=10)
        assert world.addresses()[-1] == "a"
        late = world.now
        while not replicas.due_probes(world.now):
            ask(world, times=1)
            assert world.addresses()[-1] == "b"
            world.now += 0.24
        waits.append(world.now - late)
        replicas.mark_up("a", by_health=True)
    assert waits == pytest.approx([5, 10, 20, 40, 80, 80], abs=0.25)
    # An answer ends it.
    replicas.mark_up("a")
    replicas.mark_late("a", 0.0, 5.0)
    assert replicas.due_probes(5.0) == ["a"]


def test_all_replicas_that_a_call_waited_for_are_left_alone_as_long_as_another_works() -> None:
    hung = good(1_000)
    world = World({"a": hung, "b": hung, "c": good(0.01)}, Delivery(split=SMALL))
    with pytest.raises(DeadlineExceeded):
        world.exchange(RowsJob([100] * 12), timeout_s=5.0)
    assert set(world.shared.replicas.due_probes(world.now + 5)) == {"a", "b"}
    for _ in range(6):
        world.exchange(RowsJob([1]))
    assert world.addresses()[-6:] == ["c"] * 6


def test_calls_that_waited_side_by_side_count_once() -> None:
    replicas = World({"a": good(1), "b": good(1)}).shared.replicas
    for moment in (5.0, 5.001, 5.002):
        replicas.mark_late("a", moment, 5.0)
    assert replicas.due_probes(9.9) == []
    assert replicas.due_probes(10.0) == ["a"]
    replicas.mark_up("a", by_health=True)
    replicas.mark_late("a", 15.0, 5.0)
    assert replicas.due_probes(24.9) == []
    assert replicas.due_probes(25.0) == ["a"]
