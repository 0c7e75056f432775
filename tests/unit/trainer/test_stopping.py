"""Signals to several ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from ppod_trainer.errors import StopRequestedError
from ppod_trainer.stopping import NotedSignal, StopSignal


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_another_rank_got_first_does_not_make_the_next_one_the_second() -> None:
    """A run that is deleted sends one to each rank; a second one to the same rank would end it without a checkpoint."""
    stop = StopSignal()
    stop.install()
    stop.hear(0)
    stop.check()
    stop.hear(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequestedError, match="SIGTERM"):
        stop.check()


def test_a_rank_that_follows_outlives_every_signal() -> None:
    noted = NotedSignal()
    assert noted.received == 0
    noted.install()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
    assert noted.received == signal.SIGTERM
