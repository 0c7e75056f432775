"""What becomes of a step whose weights cannot be written to the shared directory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
from torch import nn

from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import TrainerError, WeightPushError
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.pushed_runs import Replica, run_of


@pytest.mark.parametrize("encoding", ["full", "delta"])
@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "no room for"),
        (errno.EDQUOT, "no room for"),
        (errno.EIO, r"weight_transfer.directory cannot be written to: \[Errno 5\]"),
    ],
)
def test_a_step_is_kept_whose_push_finds_no_room_for_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: Literal["full", "delta"], code: int, told: str
) -> None:
    """The first version's file, which its replica serves from, fills the directory."""
    config = WeightTransferConfig(plane="shared", directory=tmp_path / "shared", encoding=encoding)
    sync = WeightSync(FixedReplicas(cast(Any, [Replica("a")]), "stop"), config)
    learner = SimpleNamespace(adapter=None, whole_model=lambda _: nn.Linear(2, 2))
    run = run_of(tmp_path, sync, TrainerState(0, 0, 0, ""), {}, learner=learner)
    run.push_policy(1)

    def fallocate(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    run._push_update(2)
    assert run.state.policy_version == 2
    with pytest.raises(WeightPushError, match=f"weight version 2: {told}"):
        run._after_step()
    sync.close()


@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_a_step_is_kept_whose_shared_directory_was_removed(tmp_path: Path, encoding: Literal["full", "delta"]) -> None:
    config = WeightTransferConfig(plane="shared", directory=tmp_path / "shared", encoding=encoding)
    sync = WeightSync(FixedReplicas(cast(Any, [Replica("a")]), "stop"), config)
    learner = SimpleNamespace(adapter=None, whole_model=lambda _: nn.Linear(2, 2))
    run = run_of(tmp_path, sync, TrainerState(0, 0, 0, ""), {}, learner=learner)
    run.push_policy(1)
    shutil.rmtree(tmp_path / "shared")
    run._push_update(2)
    with pytest.raises(WeightPushError, match=r"weight version 2: weight_transfer.directory cannot .* No such file"):
        run._after_step()
    sync.close()


def test_a_shared_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = WeightTransferConfig(plane="shared", directory=tmp_path / "file" / "shared")
    with pytest.raises(TrainerError, match=r"weight_transfer.directory: .*/shared cannot be written to: .* Not a dir"):
        WeightSync(FixedReplicas([], "stop"), config)
