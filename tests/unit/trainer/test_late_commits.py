"""Commits that are not answered in time, and are done all the same while the run pushes again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from ppod import DeadlineExceeded, FailedPrecondition
from ppod.client import LoraAdapter, Pin, WeightPush, WeightStatus
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.reference_policy import ReferencePolicy, save_policy
from ppod_trainer.training import TrainingRun
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.pushed_runs import Replica, run_of
from support.tiny_model import build_model


class Hanging(Replica):
    """Answers some commits, counted from 0, too late; what they began is done once another comes."""

    def __init__(self, *hangs: int) -> None:
        super().__init__("a")
        self._hangs = hangs
        self._asked = 0
        self._under_way: list[WeightPush] = []
        self._push_id = ""

    def status(self, **_: object) -> WeightStatus:
        return replace(super().status(), push_id=self._push_id)

    def commit(self, weight_version: int, *, push_id: str = "", **_: object) -> float:
        assert self._prepared is not None
        self._asked += 1
        if self._asked - 1 in self._hangs:
            self._under_way.append(self._prepared)
            raise DeadlineExceeded("no answer within 6 s")
        for push in self._under_way:
            self._prepared, prepared = push, self._prepared
            self._serve()
            self._prepared = prepared
            if push.weight_version == weight_version:
                raise FailedPrecondition("push_id", f"{push.push_id}: another sender pushed the same version", push_id)
        self._under_way.clear()
        self._serve()
        return 0.0

    def _serve(self) -> None:
        assert self._prepared is not None
        self._push_id = self._prepared.push_id
        super().commit(self._prepared.weight_version)


def pushing(directory: Path, replica: Hanging, adapter: object = None) -> TrainingRun:
    sync = WeightSync(FixedReplicas(cast(Any, [replica]), "stop"), WeightTransferConfig())
    leader = SimpleNamespace(
        adapter=adapter,
        whole_model=lambda _: nn.Linear(2, 2),
        base_model=lambda _: nn.Linear(2, 2),
        adapter_weights=lambda: {"x": torch.zeros(2)},
    )
    return run_of(directory, sync, TrainerState(0, 0, 0, ""), {}, learner=leader)


@pytest.mark.parametrize("hangs", [(0,), (0, 1)])
def test_a_policy_whose_commit_was_not_answered_is_pushed_under_another_version(
    tmp_path: Path, hangs: tuple[int, ...]
) -> None:
    replica = Hanging(*hangs)
    run = pushing(tmp_path, replica)
    run.push_policy(1)
    assert replica.version == run.state.policy_version == 1 + len(hangs)


@pytest.mark.parametrize("hangs", [(0,), (1,), (0, 2)], ids=["base", "adapter", "both"])
def test_so_is_an_adapter(tmp_path: Path, hangs: tuple[int, ...]) -> None:
    """The base goes first, with a commit of its own."""
    replica = Hanging(*hangs)
    run = pushing(tmp_path, replica, SimpleNamespace(description=LoraAdapter(1, 1.0, ("x",))))
    run.push_policy(1)
    assert replica.version == run.state.policy_version
    assert replica.version > replica.base > 0


def test_so_is_a_reference(tmp_path: Path) -> None:
    replica = Hanging(0)
    sync = WeightSync(FixedReplicas(cast(Any, [replica]), "stop"), WeightTransferConfig())
    described = SimpleNamespace(limits=SimpleNamespace(dtype="float32"))
    client = SimpleNamespace(pin=Pin(weight_version=0), describe=lambda: described)
    reference = ReferencePolicy(tmp_path, cast(Any, SimpleNamespace(reference=client, reference_weights=sync)))
    save_policy(build_model(), tmp_path / "version_000003")
    with pytest.raises(WeightPushError, match="commit of weight version 3 failed"):
        reference.serve(3)
    reference.serve(3)
    assert replica.version == client.pin.weight_version == 4
