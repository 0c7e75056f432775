"""Places for refused requests: told once, kept until claimed, free again when they are not."""

from __future__ import annotations

import random
from collections import deque

import pytest

from ppod.errors import ResourceExhausted
from ppod_services.core.admission import Admission, Request
from ppod_services.core.batching import BatchBounds
from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.core.config import BatchingConfig
from ppod_services.core.fair_queue import FairQueue
from ppod_services.core.promises import Promises
from ppod_services.core.quotas import Quotas
from ppod_services.core.rate import ComputeRate
from ppod_services.core.tickets import Submission


def test_places_follow_each_other_at_the_models_speed() -> None:
    promises = Promises()
    # All are expected to return at first: 10 tokens at 0.1 s each take a second of the line.
    assert promises.book("a", "1", 10, earliest_s=3.0, token_s=0.1, now_s=0.0) == 3.0
    assert promises.book("a", "2", 10, earliest_s=3.0, token_s=0.1, now_s=0.0) == pytest.approx(4.0)
    assert promises.book("b", "1", 10, earliest_s=3.0, token_s=0.1, now_s=0.0) == 3.0


def test_a_place_is_its_requests_alone_and_from_its_time_on() -> None:
    promises = Promises()
    promises.book("a", "1", 10, earliest_s=3.0, token_s=0.1, now_s=0.0)
    assert not promises.claim("a", "1", 2.9)
    assert not promises.claim("a", "2", 3.1)
    assert not promises.claim("b", "1", 3.1)
    assert not promises.claim("a", "", 3.1)
    assert promises.claim("a", "1", 3.1)
    assert promises.claim("a", "1", 3.2)


def test_newcomers_see_what_falls_due_soon() -> None:
    promises = Promises()
    for number in range(4):
        promises.book("a", str(number), 10, earliest_s=3.0 + number, token_s=0.0, now_s=0.0)
    assert promises.tokens_soon("a", 1.9) == 0
    # Those of 3 s and 4 s.
    assert promises.tokens_soon("a", 3.0) == 20
    promises.claim("a", "0", 3.0)
    assert promises.tokens_soon("a", 3.0) == 10
    # Nobody came: one by one the places are free again.
    assert promises.tokens_soon("a", 9.0) == 0


def test_a_request_without_an_id_gets_an_estimate_only() -> None:
    promises = Promises()
    promises.book("a", "", 10, earliest_s=3.0, token_s=0.1, now_s=0.0)
    assert promises.tokens_soon("a", 3.0) == 0


@pytest.mark.parametrize("obeys", [0.2, 1.0])
def test_who_obeys_gets_in_under_ten_times_the_load(obeys: float) -> None:
    """A model of 100 tokens a second, requests of 10 tokens and 5 s of patience, by a simulated clock."""
    config = BatchingConfig(max_batch_tokens=100, max_batch_size=1)
    queue: FairQueue[Submission[float]] = FairQueue(0)
    rate = ComputeRate()
    rate.finished(100, 1.0, saturated=True)
    admission = Admission(config, queue, rate, Quotas(), lambda _team, _reason: None)
    draw = random.Random(0)
    coming: deque[tuple[float, str]] = deque()
    returned = got_in = served = idle = 0
    for step in range(6_000):
        now_s = step / 100
        newcomers = [f"{step}"]
        due = [key for at_s, key in coming if at_s <= now_s]
        coming = deque((at_s, key) for at_s, key in coming if at_s > now_s)
        for key in [*due, *newcomers]:
            try:
                admission.admit(Request(10, 1, 5.0, ANONYMOUS_CALLER, key), now_s)
            except ResourceExhausted as error:
                if key in newcomers and draw.random() < obeys and error.retry_after_s < 20:
                    coming.append((now_s + error.retry_after_s, key))
            else:
                queue.add(key, ANONYMOUS_CALLER, [Submission(now_s, 10)], now_s)
                got_in += key in due
            returned += key in due
        if step % 10 == 0:
            # 10 tokens every tenth of a second.
            batch = queue.take(BatchBounds(10, 1, 0))
            served += sum(now_s - sequence.item <= 5.0 for sequence in batch)
            idle += not batch
    assert returned > 30
    assert got_in / returned > 0.95
    # The model neither waits for those who never come, nor serves anybody too late.
    assert idle <= 2
    assert served >= 0.97 * 600
