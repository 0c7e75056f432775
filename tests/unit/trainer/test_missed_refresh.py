"""A run that failed between a step and the refresh of its reference, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from ppod_trainer.checkpoint import TrainerState
from support.pushed_runs import Generation, TrainedError, run_of


class Reference:
    """Remembers which versions were kept and served."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.served: list[int] = []

    def keep(self, model: object, version: int, needed: object) -> None:
        del model, needed
        self.kept.append(version)

    def serve(self, version: int) -> None:
        self.served.append(version)

    def lost(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("loaded", "refreshed"),
    [
        (TrainerState(4, 7, 3, ""), True),
        (TrainerState(4, 7, 7, ""), False),
        (TrainerState(5, 8, 7, ""), False),
        (TrainerState(0, 0, 0, ""), False),
    ],
    ids=["missed", "done", "not due", "new"],
)
def test_a_refresh_that_a_failure_left_out_is_made_up_for(
    tmp_path: Path, loaded: TrainerState, refreshed: bool
) -> None:
    """As where the disk was full when the record of the step was written, and had room for its checkpoint."""
    further: dict[str, object] = {"reference_refresh_steps": 2, "steps": 8}
    generation = Generation()
    run = run_of(tmp_path, generation, loaded, further)
    reference, saved = Reference(), list[TrainerState]()
    run._reference = cast(Any, reference)
    run.save = lambda: saved.append(run.state) or tmp_path

    def step() -> dict[str, float]:
        raise TrainedError

    run._step = step
    run.push_policy(9)
    with pytest.raises(TrainedError):
        run.train()
    assert reference.kept == reference.served == ([9] if refreshed else [])
    assert [(state.step, state.reference_version) for state in saved] == ([(4, 9)] if refreshed else [])
