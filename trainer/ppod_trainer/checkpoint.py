"""Checkpoints: written aside and renamed, so that one that exists is whole. No pickle: safetensors and JSON.

A step's prompts, seeds and minibatches follow from (seed, step) alone, so no random state needs to be kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ppod_trainer.errors import CheckpointError
from ppod_trainer.learner import Learner
from ppod_trainer.stateful import JsonState, Stateful

_STATE = "trainer.json"
_WEIGHTS = "policy.safetensors"
_OPTIMIZER = "optimizer.safetensors"
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
    """

    step: int
    policy_version: int
    reference_version: int
    configuration: str
    components: dict[str, JsonState] = field(default_factory=dict[str, JsonState])


def save_checkpoint(directory: Path, learner: Learner, state: TrainerState, keep: int) -> Path:
    """Write a checkpoint under `directory/step_NNNNNN` and delete all but the `keep` newest."""
    target = directory / f"{_PREFIX}{state.step:06d}"
    aside = directory / f".writing-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    policy, optimizer = _tensors(learner)
    save_file(policy, aside / _WEIGHTS)
    save_file(optimizer, aside / _OPTIMIZER)
    (aside / _STATE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    if target.is_dir():
        shutil.rmtree(target)
    aside.rename(target)
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if (path / _STATE).is_file())


def load_checkpoint(directory: Path, learner: Learner, configuration: str) -> TrainerState:
    """Load the newest checkpoint into the learner.

    Raises:
        CheckpointError: there is none, it cannot be read, or another configuration made it.
    """
    found = list_checkpoints(directory)
    if not found:
        raise CheckpointError(f"resume: {directory} holds no checkpoint; start without resume")
    path = found[-1]
    try:
        state = TrainerState(**json.loads((path / _STATE).read_text(encoding="utf-8")))
        weights = load_file(path / _WEIGHTS)
        optimizer = load_file(path / _OPTIMIZER)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"resume: {path} cannot be read: {error}") from error
    if state.configuration != configuration:
        raise CheckpointError(
            f"resume: {path} was made with another configuration ({state.configuration}, now {configuration}); "
            "resume with the configuration in the run directory, or start a new run directory"
        )
    _restore(learner, weights, optimizer)
    return state


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


def _named_parameters(learner: Learner) -> dict[str, torch.nn.Parameter]:
    return dict(learner.policy.named_parameters())


def _tensors(learner: Learner) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    parameters = _named_parameters(learner)
    optimizer: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            optimizer[f"{name}/{key}"] = value.contiguous()
    return {name: parameter.detach().contiguous() for name, parameter in parameters.items()}, optimizer


@torch.no_grad()
def _restore(learner: Learner, weights: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> None:
    parameters = _named_parameters(learner)
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(f"resume: the checkpoint's tensors are not the policy's; first difference {different[0]}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
        state = {
            key.rsplit("/", maxsplit=1)[1]: value.to(parameter.device)
            for key, value in optimizer.items()
            if key.rsplit("/", maxsplit=1)[0] == name
        }
        if state:
            learner.optimizer.state[parameter] = state
