"""What a run waits for before its first step."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ppod import Pin, Unavailable
from ppod_trainer.assembly import _synchronise
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.errors import StopRequestedError, WeightPushError
from support.pushed_runs import Generation, run_of


class Late(Generation):
    """A replica that still starts does not tell which weights it has: so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def serving_versions(self) -> set[int]:
        if self._left:
            self._left -= 1
            raise WeightPushError("b does not tell which weights it has") from Unavailable("b still starts")
        return super().serving_versions()


class Reference:
    """Is away when it is first given what a run kept."""

    def __init__(self) -> None:
        self.served: list[int] = []
        self._away = True

    def serve(self, version: int) -> None:
        if self._away:
            self._away = False
            raise WeightPushError("the reference does not tell which weights it has") from Unavailable("away")
        self.served.append(version)


def test_a_replica_that_still_starts_is_waited_for_although_another_one_is_ready(tmp_path: Path) -> None:
    """`ready_timeout_s` is for the start; `recovery_timeout_s` for what goes away later."""
    generation = Late(2)
    services: dict[str, object] = {"recovery_timeout_s": 0}
    run = run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), {"services": services})
    cast(Any, run.parts.connections).reference = SimpleNamespace(pin=Pin(weight_version=0))
    _synchronise(run)
    assert generation.serves == {"a": 2, "b": 2}


def test_a_replica_that_does_not_come_is_named_once_time_ran_out(tmp_path: Path) -> None:
    services: dict[str, object] = {"ready_timeout_s": 0.1}
    run = run_of(tmp_path, Late(1000), TrainerState(0, 0, 0, ""), {"services": services})
    with pytest.raises(WeightPushError, match="b does not tell which weights it has"):
        _synchronise(run)


def test_a_run_that_is_told_to_stop_waits_for_no_replica(tmp_path: Path) -> None:
    run = run_of(tmp_path, Late(1000), TrainerState(0, 0, 0, ""), {})
    run.parts.stop.received = signal.SIGTERM
    with pytest.raises(StopRequestedError):
        _synchronise(run)


def test_a_reference_that_is_away_is_given_the_runs_own_when_it_is_back(tmp_path: Path) -> None:
    services: dict[str, object] = {"reference_admin": "127.0.0.1:1"}
    further = {"reference_refresh_steps": 2, "services": services}
    run = run_of(tmp_path, Generation(), TrainerState(3, 3, 2, ""), further)
    reference = Reference()
    run._reference = cast(Any, reference)
    _synchronise(run)
    assert reference.served == [2]
