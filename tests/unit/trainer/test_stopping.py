"""Signals to several ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from ppod_models.ending import ECHO_S
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


def test_the_echo_of_a_signal_does_not_end_a_run_without_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends it to the process and to its group, what stops a whole job to the launcher and to its trainer."""
    stop, ended = StopSignal(), list[int]()
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequestedError, match="SIGTERM"):
        stop.check()
    # Later it is the user's, who will not wait.
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + ECHO_S)
    monkeypatch.setattr(signal, "signal", lambda number, _: ended.append(number))
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [signal.SIGTERM, signal.SIGTERM]


def test_a_rank_that_follows_outlives_every_signal() -> None:
    noted = NotedSignal()
    assert noted.received == 0
    noted.install()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
    assert noted.received == signal.SIGTERM
