"""Checkpoints: written aside, synced and renamed, so that one that exists is whole. No pickle: safetensors and JSON.

The tensors are written by torch.distributed.checkpoint as safetensors files, by each rank what it holds, and read by
however many ranks there are then. A step's prompts, seeds and minibatches follow from (seed, step) alone, so no random
state needs to be kept.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from ppod_trainer.checkpoint_tensors import check_files, describe_files, read_tensors, write_tensors
from ppod_trainer.durable import aside_of, new_aside, put_in_place, tidy
from ppod_trainer.errors import CheckpointError
from ppod_trainer.learner import Learner
from ppod_trainer.ranks import Ranks
from ppod_trainer.stateful import JsonState, Stateful

_LOGGER = logging.getLogger(__name__)
_STATE = "trainer.json"
_PREFIX = "step_"


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a run needs besides tensors.

    Attributes:
        step: steps done.
        policy_version: version of the policy's weights, also in the services.
        reference_version: version of the reference's weights; 0 is the initial model.
        configuration: fingerprint of the configuration that decides the course of training.
        components: what each part of the run that changes from step to step holds, by its name; see `Stateful`.
        prompts: fingerprint of the prompts of a file; empty: not known, as of an environment's.
    """

    step: int
    policy_version: int
    reference_version: int
    configuration: str
    components: dict[str, JsonState] = field(default_factory=dict[str, JsonState])
    prompts: str = ""


def save_checkpoint(directory: Path, learner: Learner, state: TrainerState, keep: int) -> Path:
    """Write a checkpoint under `directory/step_NNNNNN` and delete all older ones but `keep`, it included.

    All ranks call it. One of a later step, which could not be read when the run resumed, stays until its step is done.

    Raises:
        CheckpointError: a rank could not write; the checkpoints that were there are still there.
    """
    target = directory / f"{_PREFIX}{state.step:06d}"
    leads = learner.ranks.rank == 0
    if leads:
        new_aside(target)
    learner.ranks.wait_for_all()
    aside = aside_of(target)
    write_tensors(aside, learner)
    files = describe_files(aside, learner.ranks)
    if leads:
        (aside / _STATE).write_text(json.dumps({**asdict(state), "files": files}, indent=2), encoding="utf-8")
        put_in_place(target)
        # A later one, which is damaged, must not take the place of one that can be resumed from.
        for old in [one for one in list_checkpoints(directory) if _step_of(one) <= state.step][:-keep]:
            shutil.rmtree(old)
    learner.ranks.wait_for_all()
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    named = (path for path in directory.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal())
    # By number: from step 1,000,000 on names are longer, and sort before those of earlier steps.
    return sorted((path for path in named if (path / _STATE).is_file()), key=_step_of)


def goes_on(directory: Path, resume: bool | Literal["if_possible"], ranks: Ranks) -> bool:
    """Whether a run goes on from a checkpoint that is there, or begins. All ranks call it.

    Raises:
        CheckpointError: it is to begin where an earlier run left its checkpoints.
    """
    if resume and ranks.rank == 0:
        # What a killed process was putting in the place of its only checkpoint does not count before.
        tidy(directory)
    found = ranks.agree(list_checkpoints(directory))
    if found and not resume:
        # Its own would count as older than those, and be deleted for them.
        raise CheckpointError(
            f"run_dir: {directory} holds {found[-1].name} of an earlier run; set resume to go on from there, or name "
            "another run_dir"
        )
    return resume is True or bool(found)


def kept_references(directory: Path) -> set[int]:
    """Versions of the references that the checkpoints need."""
    found: set[int] = set()
    for path in list_checkpoints(directory):
        try:
            found.add(int(json.loads((path / _STATE).read_text(encoding="utf-8"))["reference_version"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOGGER.warning("%s cannot be read: %s", path, error)
    return found


def load_checkpoint(directory: Path, learner: Learner, configuration: str) -> TrainerState:
    """Load the newest checkpoint that can be read into the learner; warn of newer ones. All ranks call it.

    Raises:
        CheckpointError: there is none, none can be read, or another configuration made it.
    """
    ranks = learner.ranks
    if ranks.rank == 0:
        tidy(directory)
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


def with_prompts(state: TrainerState, fingerprint: str) -> TrainerState:
    """The state of a run that draws from these prompts.

    Args:
        state: from a checkpoint, or of a new run.
        fingerprint: of the prompts; empty: they are an environment's, which may be made anew each time.

    Raises:
        CheckpointError: it drew from others before. Their places in the file tell which are held out, what a step draws
            and what was solved.
    """
    if state.prompts not in ("", fingerprint):
        raise CheckpointError(
            f"resume: the prompts of prompts.path are not those that this run had at step {state.step} "
            f"({state.prompts}, now {fingerprint}); put the file back as it was, or start a new run directory"
        )
    return replace(state, prompts=fingerprint)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


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
