"""Rollouts of coming steps: how old they may get, and what may not happen at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ppod_trainer.pipeline import RolloutPipeline
from support.versioned_rollouts import Services


@contextmanager
def pipeline(services: Services, ahead: int, steps: int, *, mixes: bool = False) -> Iterator[RolloutPipeline]:
    made = RolloutPipeline(services, ahead=ahead, steps=steps, mixes=mixes)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_samples_are_never_older_than_the_bound_and_begun_as_early_as_it_allows(ahead: int) -> None:
    services, steps, ages = Services(), 9, []
    with pipeline(services, ahead, steps) as made:
        for step in range(steps):
            [one] = made.take(step).rollouts
            assert one.rollout.prompt.index == step
            ages.append(step - int(one.rollout.versions[0]))
            # The update takes its time, in which all that may be made is made.
            time.sleep(0.02)
            with made.new_weights(step + 1):
                assert not services.generating
    assert max(ages) == ahead
    assert ages[0] == 0
    assert ages[ahead:] == [ahead] * (steps - ahead)
    assert [step for step, _ in services.asked] == list(range(steps))


def test_new_weights_wait_for_the_rollouts_under_way_and_for_no_more() -> None:
    services = Services()
    services.slow_s = 0.1
    with pipeline(services, 1, 5) as made:
        made.take(0)
        begun = time.perf_counter()
        while not services.generating:
            assert time.perf_counter() - begun < 5
        with made.new_weights(1):
            assert not services.generating
            # What is generated is scored while weights travel.
            assert services.scoring
        assert [version for _, version in services.asked] == [0, 0]
        made.take(1)
        made.take(2)
    assert services.asked[2] == (2, 1)


def test_a_new_reference_waits_for_what_is_scored() -> None:
    services = Services()
    services.slow_s = 0.1
    with pipeline(services, 1, 5) as made:
        made.take(0)
        assert services.score_begun[1].wait(5)
        with made.new_reference():
            assert not services.scoring


def test_weights_may_come_at_once_where_versions_mix() -> None:
    services = Services()
    services.slow_s = 0.2
    with pipeline(services, 1, 5, mixes=True) as made:
        made.take(0)
        while not services.generating:
            time.sleep(0.001)
        with made.new_weights(1):
            assert services.generating
        assert {version for _, version in services.asked} == {None}


def test_an_error_in_the_background_is_raised_at_its_own_step() -> None:
    services = Services()
    services.broken = 1
    with pipeline(services, 1, 5) as made:
        assert made.take(0).rollouts
        with pytest.raises(RuntimeError, match="generation broke"):
            made.take(1)


def test_rollouts_and_update_overlap() -> None:
    services = Services()
    services.slow_s = 0.05
    with pipeline(services, 1, 6) as made:
        made.take(0)
        start = time.perf_counter()
        for step in range(1, 5):
            with made.new_weights(step):
                pass
            collected = made.take(step)
            assert collected.seconds["generate"] >= 0.05
            time.sleep(0.1)  # the update
        elapsed = time.perf_counter() - start
    # One after the other would be 4 * (0.1 + 0.1).
    assert elapsed < 0.65


def test_rounds_follow_until_there_is_enough() -> None:
    services = Services()
    services.further = {1: 2}
    with pipeline(services, 0, 3) as made:
        taken = [made.take(step) for step in range(3)]
    assert [len(one.rollouts) for one in taken] == [1, 3, 1]
    assert [one.figures["rounds"] for one in taken] == [1, 3, 1]
    assert services.asked == [(0, 0), (1, 0), (1, 0), (1, 0), (2, 0)]
    assert services.numbers == [0, 0, 1, 2, 0]


def test_rounds_are_bounded() -> None:
    services = Services()
    services.further = {0: 2}
    services.never_full = True
    with pipeline(services, 0, 1) as made:
        made.take(0)
    assert services.numbers == [0, 1, 2]


def test_new_weights_wait_until_all_rounds_of_a_step_are_generated() -> None:
    """Whether a round has this version or the next must not depend on who is faster."""
    services = Services()
    services.slow_s = 0.1
    services.further = {1: 1}
    with pipeline(services, 1, 2) as made:
        made.take(0)
        until = time.monotonic() + 5
        while (1, 0) not in services.asked and time.monotonic() < until:
            time.sleep(0.005)
        # The first round of step 1 is under way; its second is to follow.
        with made.new_weights(7):
            assert services.asked == [(0, 0), (1, 0), (1, 0)]
        assert [int(one.rollout.versions[0]) for one in made.take(1).rollouts] == [0, 0]


def test_what_follows_a_step_that_failed_is_made_anew() -> None:
    services = Services()
    services.broken = 1
    with pipeline(services, 2, 4) as made:
        made.take(0)
        with pytest.raises(RuntimeError, match="generation broke"):
            made.take(1)
        services.broken = -1
        for step in (1, 2, 3):
            assert made.take(step).rollouts[0].rollout.prompt.index == step
    steps = [step for step, _ in services.asked]
    # Those that follow step 1 were begun, or still waited, when it was found to have failed.
    assert steps[:-3] in ([0, 1], [0, 1, 2], [0, 1, 2, 3])
    assert steps[-3:] == [1, 2, 3]
