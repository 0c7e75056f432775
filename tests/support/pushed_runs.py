"""Runs that push to stand-ins for replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ppod import FailedPrecondition, Unavailable
from ppod.client import ReplicaOutcome, WeightPush, WeightStatus
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.config import TrainerConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.kl import FixedKl
from ppod_trainer.score_statistics import ScoreStatistics
from ppod_trainer.stopping import StopSignal
from ppod_trainer.training import TrainingRun
from support.versioned_rollouts import Services


class TrainedError(Exception):
    """The step came to its update."""


class Generation:
    """Two replicas, as a push sees them."""

    def __init__(self) -> None:
        self.serves = {"a": 1, "b": 1}
        self.half = False
        self.gone = False

    def serving_versions(self) -> set[int]:
        self._check()
        return set(self.serves.values())

    def push(self, model: object, dtype: torch.dtype, weight_version: int) -> None:
        del model, dtype
        self._check()
        if self.half:
            self.serves["a"], self.half = weight_version, False
            raise WeightPushError("commit failed on 1 of 2") from Unavailable("b is away")
        self.serves = dict.fromkeys(self.serves, weight_version)

    def _check(self) -> None:
        if self.gone:
            raise WeightPushError("a does not tell which weights it has") from Unavailable("gone")


class Replica:
    """A `WeightClient` of a server that may be started again, and then has what it was first started with."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.before_push: Callable[[], None] | None = None
        self.restart()

    def restart(self) -> None:
        self.version = self.base = 0
        self._prepared: WeightPush | None = None

    def status(self, **_: object) -> WeightStatus:
        return WeightStatus(cast(Any, SimpleNamespace(weight_version=self.version)), None, self.base)

    def push(self, push: WeightPush) -> object:
        if self.before_push is not None:
            self.before_push()
            self.before_push = None
        if push.base_version is not None and push.base_version != self.base:
            raise FailedPrecondition("base_version", str(self.base), str(push.base_version))
        self._prepared = push
        return SimpleNamespace(replicas=(ReplicaOutcome(self.target, None),))

    def commit(self, weight_version: int, **_: object) -> float:
        assert self._prepared is not None
        self.version = weight_version
        if self._prepared.adapter is None:
            self.base = weight_version
        return 0.0

    def close(self) -> None: ...


def run_of(
    directory: Path, generation: object, state: TrainerState, further: dict[str, object], **parts: object
) -> TrainingRun:
    """A run whose services are stand-ins."""

    def wait_ready(_: float) -> None:
        if getattr(generation, "gone", False):
            raise Unavailable("generation is not ready")

    connections = SimpleNamespace(
        reference=None,
        reference_weights=None,
        wait_ready=wait_ready,
        generation_weights=generation,
        generation=SimpleNamespace(describe=lambda: SimpleNamespace(limits=SimpleNamespace(dtype="float32"))),
    )
    given: dict[str, object] = {
        "connections": connections,
        "rollouts": Services(),
        "stop": StopSignal(),
        "learner": SimpleNamespace(adapter=None, whole_model=lambda *_: None),
        "kl": FixedKl(0.1),
        "scores": ScoreStatistics(),
        "watcher": None,
    }
    config = TrainerConfig.model_validate({"run_dir": str(directory), **further})
    return TrainingRun(config, cast(Any, SimpleNamespace(**(given | parts))), state)
