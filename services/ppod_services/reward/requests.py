"""What passes between the rewards and the models' queue. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ppod.tensors import FloatArray, TokenArray
from ppod_services.core.scheduler import Sink
from ppod_services.reward.samples import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """One sequence for a model, int32 [length], and the positions to read a value at, int32 [reads]."""

    tokens: TokenArray
    reads: IntArray


class Scorer(Protocol):
    """A loaded reward model. Called in the models' thread only."""

    @property
    def scores_prefixes(self) -> bool:
        """Whether the value read at a position is exactly the score of the sequence up to it."""
        ...

    def end_of(self, tokens: TokenArray) -> int:
        """The position at which the score of the whole sequence is read."""
        ...

    def score(self, inputs: Sequence[ModelInput]) -> Sequence[FloatArray]:
        """float32 [reads] for each input; pads by itself."""
        ...

    def tokens_of(self, one: ModelInput) -> int:
        """Tokens that the model runs for an input."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class RewardItem:
    """One sequence in the queue, bound to the model that was serving when its request came.

    A model that is replaced answers what it was asked before, so that every reply is from one version.
    """

    scorer: Scorer
    input: ModelInput


def run_batch(items: Sequence[RewardItem], sink: Sink[FloatArray]) -> None:
    """Score a batch; all of its items name one model."""
    values = items[0].scorer.score([item.input for item in items])
    for position, read in enumerate(values):
        sink.emit(position, np.asarray(read, dtype=np.float32))
