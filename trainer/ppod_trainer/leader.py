"""Rank 0's hold on all ranks: what it does with the learner, the others do at the same time."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ppod_trainer.checkpoint import TrainerState, save_checkpoint
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import PpoBatch
from ppod_trainer.learner import Learner, UpdateStats
from ppod_trainer.metrics import StepTimer
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.sharding import fill, gather_parameters
from ppod_trainer.stateful import JsonState, Stateful

if TYPE_CHECKING:
    # It imports PEFT, which takes seconds that no other run should spend.
    from ppod_trainer.adapters import PolicyAdapter


@dataclass(frozen=True, slots=True)
class Learn:
    """Order: `Learner.learn`."""

    rollouts: Sequence[ScoredRollout]
    step: int
    controls: StepControls


@dataclass(frozen=True, slots=True)
class Share:
    """Order: take these states of the parts that all ranks have, by name."""

    states: dict[str, JsonState]


@dataclass(frozen=True, slots=True)
class Gather:
    """Order: take part in gathering the policy's weights whose names have this part, in this dtype."""

    dtype: torch.dtype
    only: str


@dataclass(frozen=True, slots=True)
class Save:
    """Order: `save_checkpoint`."""

    directory: Path
    state: TrainerState
    keep: int


@dataclass(frozen=True, slots=True)
class End:
    """Order: the run is over."""


Order = Learn | Share | Gather | Save | End


@dataclass(slots=True)
class Leader:
    """The learner as the training loop uses it, however many ranks there are.

    Attributes:
        learner: this rank's.
        hollow: the policy's language model without weights; None where this rank holds them whole, and not adapted.
        adapter: what of the model is trained; None: all of it.
        shared: parts that advantages are made with, which each rank has whole and alike.
        signalled: a signal that another rank had got by the last update; 0: none.
    """

    learner: Learner
    hollow: PreTrainedModel | None = None
    adapter: PolicyAdapter | None = None
    shared: Mapping[str, Stateful] = field(default_factory=dict[str, Stateful])
    signalled: int = field(default=0, init=False)
    _in_step: bool = field(default=True, init=False)

    def learn(
        self, rollouts: Sequence[ScoredRollout], step: int, controls: StepControls, timer: StepTimer
    ) -> tuple[PpoBatch, UpdateStats]:
        """See `Learner.learn`."""
        with self._together(Learn(rollouts, step, controls)):
            learned = self.learner.learn(rollouts, step, controls, timer)
            self.signalled = int(self.learner.ranks.largest(0))
            return learned

    def share(self) -> None:
        """Give the other ranks what was sampled, or restored, of the shared parts."""
        with self._together(Share({name: one.state() for name, one in self.shared.items()})):
            pass

    def whole_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The language model with all its weights, an adapter merged into them.

        Where ranks divide them it is a copy on the CPU, gathered tensor by tensor in `dtype`; else the model itself.
        """
        if self.hollow is None:
            return self.learner.policy.model
        # What an adapter adds is smaller than what bfloat16 tells apart: it is merged before it is rounded.
        gathered = self._gather(dtype if self.adapter is None else torch.float32)
        if self.adapter is None:
            return fill(self.hollow, gathered)
        return fill(self.hollow, {name: one.to(dtype) for name, one in self.adapter.merged(gathered).items()})

    def base_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """What the adapter is on, a copy on the CPU. There must be an adapter."""
        assert self.hollow is not None
        assert self.adapter is not None
        return fill(self.hollow, self.adapter.base(self._gather(dtype)))

    def adapter_weights(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors in float32, as PEFT saves them. There must be an adapter."""
        assert self.adapter is not None
        return self.adapter.saved(self._gather(torch.float32, only=".lora_"))

    def _gather(self, dtype: torch.dtype, only: str = "") -> dict[str, torch.Tensor]:
        with self._together(Gather(dtype, only)):
            return dict(gather_parameters(self.learner.policy.model, dtype, only))

    def save(self, directory: Path, state: TrainerState, keep: int) -> Path:
        """See `save_checkpoint`."""
        with self._together(Save(directory, state, keep)):
            return save_checkpoint(directory, self.learner, state, keep)

    def close(self) -> None:
        """Let the other ranks end. After a failure they notice that this one is gone, and end with an error."""
        if self._in_step:
            self.learner.ranks.tell(End())

    @property
    def broken(self) -> bool:
        """Whether an order failed: then the other ranks, if they live, are amid it, and none can be given."""
        return not self._in_step

    @contextmanager
    def _together(self, order: Order) -> Generator[None]:
        self._in_step = False
        self.learner.ranks.tell(order)
        yield
        self._in_step = True
