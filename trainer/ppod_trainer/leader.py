"""Rank 0's hold on all ranks: what it does with the learner, the others do at the same time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ppod_trainer.checkpoint import TrainerState, save_checkpoint
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import PpoBatch
from ppod_trainer.learner import Learner, UpdateStats
from ppod_trainer.metrics import StepTimer
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.sharding import fill, gather_parameters


@dataclass(frozen=True, slots=True)
class Learn:
    """Order: `Learner.learn`."""

    rollouts: Sequence[ScoredRollout]
    step: int
    controls: StepControls


@dataclass(frozen=True, slots=True)
class Gather:
    """Order: take part in gathering the policy's weights, in this dtype."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Save:
    """Order: `save_checkpoint`."""

    directory: Path
    state: TrainerState
    keep: int


@dataclass(frozen=True, slots=True)
class End:
    """Order: the run is over."""


Order = Learn | Gather | Save | End


@dataclass(slots=True)
class Leader:
    """The learner as the training loop uses it, however many ranks there are.

    Attributes:
        learner: this rank's.
        hollow: the policy's language model without weights; None where this rank holds them whole.
    """

    learner: Learner
    hollow: PreTrainedModel | None = None
    _in_step: bool = field(default=True, init=False)

    def learn(
        self, rollouts: Sequence[ScoredRollout], step: int, controls: StepControls, timer: StepTimer
    ) -> tuple[PpoBatch, UpdateStats]:
        """See `Learner.learn`."""
        with self._together(Learn(rollouts, step, controls)):
            return self.learner.learn(rollouts, step, controls, timer)

    def whole_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The language model with all its weights.

        Where ranks divide them it is a copy on the CPU, gathered tensor by tensor in `dtype`; else the model itself.
        """
        if self.hollow is None:
            return self.learner.policy.model
        with self._together(Gather(dtype)):
            return fill(self.hollow, gather_parameters(self.learner.policy.model, dtype))

    def save(self, directory: Path, state: TrainerState, keep: int) -> Path:
        """See `save_checkpoint`."""
        with self._together(Save(directory, state, keep)):
            return save_checkpoint(directory, self.learner, state, keep)

    def close(self) -> None:
        """Let the other ranks end. After a failure they notice that this one is gone, and end with an error."""
        if self._in_step:
            self.learner.ranks.tell(End())

    @contextmanager
    def _together(self, order: Order) -> Generator[None]:
        self._in_step = False
        self.learner.ranks.tell(order)
        yield
        self._in_step = True
