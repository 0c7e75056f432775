"""Runs that push to stand-ins for replicas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ppod import Unavailable
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
