"""Which troubles of a push a run waits out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ppod import DeadlineExceeded, InvalidArgument, PermissionDenied, PpodError, ResourceExhausted, Unavailable
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.errors import WeightPushError, with_notes
from ppod_trainer.training import TrainingRun
from support.pushed_runs import Generation, run_of


class Refusing(Generation):
    """Refuses the first push, on each replica with an error."""

    def __init__(self, *errors: PpodError) -> None:
        super().__init__()
        self._errors = errors

    def push(self, model: object, dtype: torch.dtype, weight_version: int) -> None:
        errors, self._errors = self._errors, ()
        if errors:
            raise WeightPushError(f"prepare failed: {'; '.join(map(str, errors))}", errors) from errors[0]
        super().push(model, dtype, weight_version)


def test_a_push_that_is_told_to_come_again_comes_again(tmp_path: Path) -> None:
    """As by a replica that still takes what a trainer sent which was killed."""
    generation = Refusing(ResourceExhausted("another transfer of weights is under way", 1.0))
    run = run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), {})
    run.push_policy(2)
    assert generation.serves == {"a": 2, "b": 2}


def test_a_push_that_no_time_makes_room_for_ends_the_run(tmp_path: Path) -> None:
    generation = Refusing(ResourceExhausted("no room for 8 bytes of weights", 0.0))
    run = run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), {})
    with pytest.raises(WeightPushError, match="no room"):
        run.push_policy(2)


@pytest.mark.parametrize("order", [1, -1])
def test_a_push_that_one_replica_will_never_take_is_not_waited_for(tmp_path: Path, order: int) -> None:
    """Whichever of them is told of first."""
    errors = [Unavailable("it is moved"), InvalidArgument("tensors", "lm_head.weight", "those of the model")]
    run = run_of(tmp_path, Refusing(*errors[::order]), TrainerState(0, 0, 0, ""), {})
    with pytest.raises(WeightPushError, match=r"lm_head\.weight"):
        run.push_policy(2)


def test_a_push_that_each_replica_may_take_later_is_waited_for(tmp_path: Path) -> None:
    generation = Refusing(Unavailable("it is moved"), DeadlineExceeded("no answer within 120 s"))
    run = run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), {})
    run.push_policy(2)
    assert generation.serves == {"a": 2, "b": 2}


def describing(run: TrainingRun, *errors: PpodError) -> None:
    """Have generation answer with these errors, one after the other, before it describes what it serves."""
    left = list(errors)

    def describe() -> object:
        if left:
            raise left.pop(0)
        return SimpleNamespace(limits=SimpleNamespace(dtype="float32"))

    cast(Any, run.parts.connections.generation).describe = describe


def test_a_push_before_which_generation_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    """It is asked which data type its weights have, as by a service that hangs for a while."""
    generation = Generation()
    run = run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), {})
    describing(run, DeadlineExceeded("no answer within 120 s"))
    run.push_policy(2)
    assert generation.serves == {"a": 2, "b": 2}


def test_a_step_is_kept_before_whose_push_generation_does_not_tell_its_data_type(tmp_path: Path) -> None:
    run = run_of(tmp_path, Generation(), TrainerState(0, 0, 0, ""), {})
    describing(run, PermissionDenied("the token was replaced"))
    run._push_update(2)
    assert run.state.policy_version == 2
    with pytest.raises(WeightPushError, match=r"which data type its weights have: the token was replaced"):
        run._after_step()


def test_what_keeps_a_service_that_is_back_from_its_weights_is_told(tmp_path: Path) -> None:
    """It was away first, and then is another model."""

    class Other(Generation):
        def push(self, model: object, dtype: torch.dtype, weight_version: int) -> None:
            del model, dtype, weight_version
            error = InvalidArgument("tensors", "no lm_head.weight", "the tensors of this model")
            raise WeightPushError(f"prepare failed on 2 of 2: {error}") from error

    run = run_of(tmp_path, Other(), TrainerState(0, 0, 0, ""), {})
    describing(run, Unavailable("connection refused"))
    with pytest.raises(WeightPushError, match="connection refused") as raised:
        run.push_policy(2)
    told = "prepare failed on 2 of 2: tensors: found no lm_head.weight, expected the tensors of this model"
    assert with_notes(raised.value).endswith(f"connection refused; at last: {told}")
