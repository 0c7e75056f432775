"""Which prompts a step samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.stateful import JsonState


class PromptSchedule(Protocol):
    """Chooses prompts; a `Stateful` whose state is that before the first step that is not trained yet.

    Steps come in their order, and all that was sampled for one is recorded before the next is asked for. They may be
    asked for again, and run ahead of what is trained.
    """

    def prompts(self, step: int, number: int) -> list[Prompt]:
        """Those of a step's round; round 0 is the first."""
        ...

    def record(self, step: int, rounds: Sequence[Sequence[ScoredRollout]]) -> dict[str, float]:
        """Take in all that was sampled for a step; figures for the metrics."""
        ...

    def settle(self, step: int) -> None:
        """This is the first step that is not trained yet."""
        ...

    def state(self) -> JsonState:
        """See `Stateful`."""
        ...

    def restore(self, state: JsonState) -> None:
        """See `Stateful`."""
        ...


def further_prompts(chosen: Sequence[Prompt], pool: Sequence[Prompt], key: Sequence[int], number: int) -> list[Prompt]:
    """As many prompts as were chosen for the first round, for round `number`, by the key and the round alone.

    They come from an order of those of the pool that were not chosen; where they run out it begins again, with all.
    """
    taken = {prompt.index for prompt in chosen}
    rest = [prompt for prompt in pool if prompt.index not in taken] or list(pool)
    generator = np.random.default_rng(list(key))
    start, count = (number - 1) * len(chosen), len(chosen)
    order: list[int] = []
    while len(order) < start + count:
        order += generator.permutation(len(rest)).tolist()
    return [rest[place] for place in order[start : start + count]]


class EpochSchedule:
    """Each epoch goes through all prompts, in an order of its own.

    Args:
        prompts: of training.
        per_step: prompts in a round.
        seed: of the run.
    """

    def __init__(self, prompts: PromptSet, per_step: int, seed: int) -> None:
        self._prompts = prompts
        self._per_step = per_step
        self._seed = seed

    def prompts(self, step: int, number: int) -> list[Prompt]:
        """See `PromptSchedule`."""
        chosen = self._prompts.for_step(step, self._per_step, self._seed)
        if not number:
            return chosen
        pool = self._prompts.reach(step, self._per_step)
        return further_prompts(chosen, pool, (self._seed, 2, step), number)

    def record(self, step: int, rounds: Sequence[Sequence[ScoredRollout]]) -> dict[str, float]:
        """Nothing depends on outcomes."""
        del step, rounds
        return {}

    def settle(self, step: int) -> None:
        """Nothing is kept."""

    def state(self) -> JsonState:
        """Nothing changes."""
        return {}

    def restore(self, state: JsonState) -> None:
        """Nothing changes."""
