"""What callers get through a network that cuts connections anywhere, loses bytes or refuses: right results, in time."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from ppod import Delivery, GenerationClient, HedgePolicy, Pin, RewardClient, Sampling
from support.faulty_network import FaultyProxy, Way, faulty_proxies
from support.processes import ServiceProcess

TIMEOUT_S = 10.0
PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15], [16]]
SEEDS = list(range(8))
SAMPLING = Sampling(max_tokens=40, n=2)


def cutting(way: Way, after: int) -> Callable[[FaultyProxy], None]:
    def cut(proxy: FaultyProxy) -> None:
        proxy.faults.cut_after = way, after

    return cut


def losing(way: Way) -> Callable[[FaultyProxy], None]:
    def lose(proxy: FaultyProxy) -> None:
        proxy.faults.lost = way

    return lose


FAULTS: list[Callable[[FaultyProxy], None]] = [
    FaultyProxy.cut,
    FaultyProxy.refuse,
    losing("up"),
    losing("down"),
    *(cutting(way, after) for way in ("up", "down") for after in (1, 40, 150, 400)),
]


def test_scores_come_through_a_network_with_one_bad_way(reward_service: ServiceProcess) -> None:
    """Each fault on each of three ways; calls are asked again a few times, and nothing stays booked."""
    sequences = [list(range(begin, begin + 30)) for begin in range(6)]
    pin, codes = Pin(model="first"), Counter[str]()
    with RewardClient(reward_service.target, pin=pin) as direct:
        expected = direct.score(sequences).values
    delivery = Delivery(hedge=HedgePolicy(delay_s=0.2, max_extra_fraction=1.0))
    calls = 0
    with faulty_proxies(reward_service.port, 3) as proxies:
        for fault, bad in itertools.product(FAULTS, proxies):
            # A client of its own: one that has just been mended would not be asked for a while.
            with RewardClient(
                ",".join(proxy.target for proxy in proxies),
                timeout_s=TIMEOUT_S,
                pin=pin,
                delivery=delivery,
                rng=random.Random(0),
                observer=lambda _, __, code: codes.update([code]),
            ) as client:
                fault(bad)
                # One of them, at the least, goes that way.
                for _ in proxies:
                    started = time.monotonic()
                    found = client.score(sequences).values
                    assert time.monotonic() - started < TIMEOUT_S / 2
                    # What is asked twice may be run together, and then differs by rounding.
                    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
                    calls += 1
                bad.mend()
                assert set(client._core.shared.replicas.outstanding().values()) == {0}
        assert sum(proxy.cuts for proxy in proxies) >= len(FAULTS)
    assert codes["OK"] >= calls
    assert sum(codes.values()) <= 3 * calls, "no storm of repeats"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_stream_that_is_cut_anywhere_is_resumed_to_the_same_samples(
    generation_service: ServiceProcess, way: Way
) -> None:
    codes = Counter[str]()
    with GenerationClient(generation_service.target) as direct:
        expected = direct.generate(PROMPTS, SAMPLING, seeds=SEEDS)
    with faulty_proxies(generation_service.port, 1) as [proxy]:
        for after in range(1, 1500, 75):
            with GenerationClient(
                proxy.target,
                timeout_s=TIMEOUT_S,
                # With these waits a replica is found again whose channel has just given up a connection.
                rng=random.Random(0),
                observer=lambda _, __, code: codes.update([code]),
            ) as client:
                proxy.faults.cut_after = way, after
                found = client.generate(PROMPTS, SAMPLING, seeds=SEEDS)
            assert [(one.index, one.sample, one.seed) for one in found] == [
                (one.index, one.sample, one.seed) for one in expected
            ]
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one.token_ids, other.token_ids)
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
        assert proxy.cuts >= 3
    assert codes["OK"] == 20
    assert 3 <= codes["UNAVAILABLE"] <= 80
    assert set(codes) == {"OK", "UNAVAILABLE"}
