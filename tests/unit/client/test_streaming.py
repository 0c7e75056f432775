"""Where a stream is opened next: after one replica hung, not there."""

from __future__ import annotations

import random

import pytest

from ppod.client.delivery import Delivery
from ppod.client.exchange import Shared
from ppod.client.latencies import Latencies
from ppod.client.replicas import Replicas
from ppod.client.streaming import StreamDelivery
from ppod.errors import DeadlineExceeded, PpodError


class Job:
    """Asks for one thing that never comes."""

    method = "/test/Stream"
    tokens = 1
    resumable = True
    complete = False

    def encode(self) -> bytes:
        return b""

    def accept(self, data: bytes) -> bytes:
        return data

    def locate(self, error: PpodError) -> None: ...

    def finish(self) -> None: ...


@pytest.mark.parametrize("answers", [False, True])
def test_a_replica_that_sends_nothing_until_the_deadline_is_left_alone_for_as_long(answers: bool) -> None:
    """One that has sent something works, if slowly."""
    replicas = Replicas(["a", "b"])
    shared = Shared(replicas, Delivery(), Latencies(), None, random.Random(0))

    def stream(now: float) -> StreamDelivery[bytes]:
        delivery = StreamDelivery(Job(), shared, now + 5.0)
        found = delivery.open(now)
        assert found.timeout_s == 5.0
        opened.append(found.address)
        return delivery

    opened: list[str] = []
    late = stream(10.0)
    if answers:
        assert late.accept(b"one of two") == b"one of two"
    with pytest.raises(DeadlineExceeded):
        late.failed(DeadlineExceeded("deadline"), 15.0)
    for _ in range(3):
        stream(15.0).closed()
    assert opened == (["a", "b", "a", "b"] if answers else ["a", "b", "b", "b"])
    assert replicas.due_probes(19.9) == []
    assert replicas.due_probes(20.0) == ([] if answers else ["a"])
    replicas.mark_up("a", by_health=True)
    stream(20.0).closed()
    assert opened[-1] == "a"
