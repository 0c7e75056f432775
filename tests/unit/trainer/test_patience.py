"""How long a run asks a service again that refuses for now."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from ppod import InvalidArgument, PpodError, ResourceExhausted
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.patience import Patience
from ppod_trainer.prompts import Prompt
from ppod_trainer.stopping import StopSignal


class Service:
    """Answers with these errors first, and notes when it was asked."""

    def __init__(self, *errors: PpodError) -> None:
        self._errors = list(errors)
        self.asked: list[float] = []

    def __call__(self) -> str:
        self.asked.append(time.monotonic())
        if self._errors:
            raise self._errors.pop(0)
        return "scores"


def busy(seconds: float) -> ResourceExhausted:
    return ResourceExhausted("the quota is spent", seconds)


def test_it_is_asked_again_when_it_says_so() -> None:
    service = Service(busy(0.3), busy(0.1))
    assert Patience(5.0).ask(service) == "scores"
    first, second = (after - before for before, after in zip(service.asked, service.asked[1:], strict=False))
    assert 0.3 <= first < 2.0
    assert 0.1 <= second < 2.0


@pytest.mark.parametrize(
    ("patience", "error"),
    [
        (Patience(5.0), busy(6.0)),  # not in time
        (Patience(5.0), busy(0.0)),  # no time makes room
        (Patience(), busy(0.1)),
        (Patience(5.0), InvalidArgument("tokens", "none", "some")),
    ],
)
def test_it_is_not_asked_again_where_that_is_of_no_use(patience: Patience, error: PpodError) -> None:
    service = Service(error)
    with pytest.raises(type(error)):
        patience.ask(service)
    assert len(service.asked) == 1


def test_all_waits_together_are_no_longer_than_the_longest() -> None:
    service = Service(busy(0.8), busy(0.8), busy(0.8))
    with pytest.raises(ResourceExhausted):
        Patience(2.0).ask(service)
    assert len(service.asked) == 3


def test_a_run_that_is_told_to_stop_waits_no_longer() -> None:
    """Also in a thread that its signal does not reach."""
    stop, begun = StopSignal(), time.monotonic()
    threading.Timer(0.3, stop.hear, [signal.SIGTERM]).start()
    with pytest.raises(ResourceExhausted):
        Patience(60.0, stop).ask(Service(busy(50.0)))
    assert time.monotonic() - begun < 5.0


@dataclass(frozen=True)
class Sample:
    prompt: Prompt


def test_samples_are_kept_while_their_service_is_waited_for() -> None:
    service, sample = Service(busy(0.1)), Sample(Prompt(0, np.array([1], dtype=np.int32)))
    bad_samples = BadSamples("stop", Patience(5.0))
    assert bad_samples.call([sample], lambda kept: [service() for _ in kept]) == ([sample], ["scores"])
    assert len(service.asked) == 2
