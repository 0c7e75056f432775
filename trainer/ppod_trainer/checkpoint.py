"""Checkpoints: written aside, synced and renamed, so that one that exists is whole. No pickle: safetensors and JSON.

The tensors are written by torch.distributed.checkpoint as safetensors files, by each rank what it holds, and read by
however many ranks there are then. A step's prompts, seeds and minibatches follow from (seed, step) alone, so no random
state needs to be kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ppod_trainer.checkpoint_tensors import check_files, describe_files, read_tensors, write_tensors
from ppod_trainer.errors import CheckpointError
from ppod_trainer.learner import Learner
from ppod_trainer.ranks import Ranks
from ppod_trainer.stateful import JsonState, Stateful

_LOGGER = logging.getLogger(__name__)
_STATE = "trainer.json"
_PREFIX = "step_"
_WRITING = ".writing-"
_REPLACED = ".replaced-"


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a run needs besides tensors.

    Attributes:
        step: steps done.
        policy_version: version of the policy's weights, also in the services.
        reference_version: version of the reference's weights; 0 is the initial model.
        configuration: fingerprint of the configuration that decides the course of training.
        components: what each part of the run that changes from step to step holds, by its name; see `Stateful`.
    """

    step: int
    policy_version: int
    reference_version: int
    configuration: str
    components: dict[str, JsonState] = field(default_factory=dict[str, JsonState])


def save_checkpoint(directory: Path, learner: Learner, state: TrainerState, keep: int) -> Path:
    """Write a checkpoint under `directory/step_NNNNNN` and delete all but the `keep` newest. All ranks call it.

    Raises:
        CheckpointError: a rank could not write; the checkpoints that were there are still there.
    """
    target = directory / f"{_PREFIX}{state.step:06d}"
    aside = directory / f"{_WRITING}{target.name}"
    leads = learner.ranks.rank == 0
    if leads:
        _tidy(directory)
        aside.mkdir(parents=True)
    learner.ranks.wait_for_all()
    write_tensors(aside, learner)
    files = describe_files(aside, learner.ranks)
    if leads:
        _write_synced(aside / _STATE, json.dumps({**asdict(state), "files": files}, indent=2))
        _replace(target, aside)
        for old in list_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    learner.ranks.wait_for_all()
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if (path / _STATE).is_file())


def load_checkpoint(directory: Path, learner: Learner, configuration: str) -> TrainerState:
    """Load the newest checkpoint that can be read into the learner; warn of newer ones. All ranks call it.

    Raises:
        CheckpointError: there is none, none can be read, or another configuration made it.
    """
    ranks = learner.ranks
    if ranks.rank == 0:
        _tidy(directory)
    found = ranks.agree(list_checkpoints(directory))
    if not found:
        raise CheckpointError(f"resume: {directory} holds no checkpoint; start without resume")
    faults: list[str] = []
    for path in reversed(found):
        outcome = _examine(path, configuration, ranks)
        if isinstance(outcome, TrainerState):
            for fault in faults:
                _LOGGER.warning("resume: %s; going on from %s", fault, path)
            read_tensors(path, learner)
            return outcome
        faults.append(outcome)
    raise CheckpointError("resume: " + "; ".join(faults))


def restore_components(components: Mapping[str, Stateful], state: TrainerState) -> None:
    """Give each part of a run what a checkpoint kept of it; a state without parts is that of a new run.

    Raises:
        CheckpointError: a part is missing in the checkpoint, or what is kept of it is not its state.
    """
    if not state.components:
        return
    for name, component in components.items():
        try:
            component.restore(state.components[name])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"resume: the checkpoint of step {state.step} does not hold the state of {name} ({error!r}); "
                "it was made by another version of ppod"
            ) from error


def _examine(path: Path, configuration: str, ranks: Ranks) -> TrainerState | str:
    """A checkpoint's state where all of it can be read, else what is wrong with it; the same on all ranks."""
    outcome: TrainerState | str
    try:
        values = json.loads((path / _STATE).read_text(encoding="utf-8"))
        files = values.pop("files")
        outcome = TrainerState(**values)
        _check_configuration(path, outcome, configuration)
        check_files(path, files, ranks)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        outcome = f"{path} cannot be read: {error}"
    # One rank's disk may hold what another's does not.
    return next((one for one in ranks.collect(outcome) if isinstance(one, str)), outcome)


def _check_configuration(path: Path, state: TrainerState, configuration: str) -> None:
    if state.configuration != configuration:
        raise CheckpointError(
            f"resume: {path} was made with another configuration ({state.configuration}, now {configuration}); "
            "resume with the configuration in the run directory, or start a new run directory"
        )


def _tidy(directory: Path) -> None:
    """Finish what a process that was killed left half done."""
    for path in directory.glob(f"{_WRITING}*"):
        shutil.rmtree(path)
    for path in directory.glob(f"{_REPLACED}*"):
        target = directory / path.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)


def _replace(target: Path, aside: Path) -> None:
    """Put a directory in the place of another, so that after a crash one of them is there, whole."""
    _sync_directory(aside)
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if target.is_dir():
        target.rename(replaced)
    aside.rename(target)
    _sync_directory(target.parent)
    if replaced.is_dir():
        shutil.rmtree(replaced)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
