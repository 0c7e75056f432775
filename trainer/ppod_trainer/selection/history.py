"""History resampling: what was solved in an epoch is left out of the next.

Zhang et al. 2025, "SRPO: A Cross-Domain Implementation of Large-Scale Reinforcement Learning on LLM", history
resampling: at the end of an epoch prompts all of whose samples were right are filtered out, since they have no
advantages to learn from; those with mixed outcomes are kept, and those that were all wrong, too, unlike DAPO's, because
they may be solved later.

What differs: a prompt that was left out comes back an epoch later, so that what the policy forgets is learned again. An
epoch in which nothing would be left has all prompts.

The order of an epoch follows from (seed, epoch), and what is left out from the outcomes of the steps before. Where an
epoch ends amid a step, the next begins with what is known then: the outcomes of the step's own samples count for the
one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import numpy as np

from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.rounding import reaches
from ppod_trainer.selection.schedule import further_prompts
from ppod_trainer.stateful import JsonState


@dataclass(frozen=True, slots=True)
class _Epoch:
    """Where a step begins.

    Attributes:
        step: the step.
        number: of the epoch.
        position: prompts of the epoch that were used.
        skipped: indices of the prompts that it leaves out, in order.
        solved: indices of those that were solved in it so far, in order.
    """

    step: int = 0
    number: int = 0
    position: int = 0
    skipped: tuple[int, ...] = ()
    solved: tuple[int, ...] = ()


class HistorySchedule:
    """A `PromptSchedule` of the prompts that are not solved yet.

    Args:
        prompts: of training.
        per_step: prompts in a round.
        seed: of the run.
        solved_outcome: a sample is right if it was paid this much.
    """

    def __init__(self, prompts: PromptSet, per_step: int, seed: int, solved_outcome: float) -> None:
        self._pool = prompts.training
        self._per_step = per_step
        self._seed = seed
        self._solved_outcome = solved_outcome
        self._settled = 0
        self._before = {0: _Epoch()}

    def prompts(self, step: int, number: int) -> list[Prompt]:
        """See `PromptSchedule`."""
        chosen, epoch = self._draw(self._before[step])
        if not number:
            return chosen
        skipped = set(epoch.skipped)
        pool = [prompt for prompt in self._pool if prompt.index not in skipped]
        return further_prompts(chosen, pool, (self._seed, 2, step), number)

    def record(self, step: int, rounds: Sequence[Sequence[ScoredRollout]]) -> dict[str, float]:
        """See `PromptSchedule`. A prompt that was sampled several times in a step is solved if all of it was right."""
        right: dict[int, bool] = {}
        for one in (one for samples in rounds for one in samples):
            index = one.rollout.prompt.index
            right[index] = right.get(index, True) and reaches(one.outcome, self._solved_outcome)
        _, epoch = self._draw(self._before[step])
        solved = {index for index in epoch.solved if right.get(index, True)}
        solved |= {index for index, all_right in right.items() if all_right}
        self._before[step + 1] = replace(epoch, step=step + 1, solved=tuple(sorted(solved)))
        return {"selection/skipped_prompts": float(len(epoch.skipped)), "selection/epoch": float(epoch.number)}

    def settle(self, step: int) -> None:
        """See `PromptSchedule`; what lies before is needed no more."""
        self._settled = step
        # A copy: rollouts of coming steps may be recorded meanwhile, in a thread of their own.
        for old in [each for each in list(self._before) if each < step]:
            del self._before[old]

    def state(self) -> JsonState:
        """Where the first step that is not trained yet begins."""
        return cast(JsonState, asdict(self._before[self._settled]))

    def restore(self, state: JsonState) -> None:
        """See `Stateful`."""
        values = {name: state[name] for name in ("step", "number", "position", "skipped", "solved")}
        kept = _Epoch(
            step=cast(int, values["step"]),
            number=cast(int, values["number"]),
            position=cast(int, values["position"]),
            skipped=tuple(cast("list[int]", values["skipped"])),
            solved=tuple(cast("list[int]", values["solved"])),
        )
        self._settled, self._before = kept.step, {kept.step: kept}

    def _draw(self, epoch: _Epoch) -> tuple[list[Prompt], _Epoch]:
        """The next prompts, and where that leads to; of what is solved nothing is known yet but what was."""
        chosen: list[Prompt] = []
        while len(chosen) < self._per_step:
            order = self._order(epoch)
            some = order[epoch.position : epoch.position + self._per_step - len(chosen)]
            chosen += some
            epoch = replace(epoch, position=epoch.position + len(some))
            if epoch.position == len(order) and len(chosen) < self._per_step:
                epoch = self._next(epoch)
        return chosen, epoch

    def _next(self, epoch: _Epoch) -> _Epoch:
        skipped = epoch.solved if len(epoch.solved) < len(self._pool) else ()
        return replace(epoch, number=epoch.number + 1, position=0, skipped=skipped, solved=())

    def _order(self, epoch: _Epoch) -> list[Prompt]:
        skipped = set(epoch.skipped)
        order = np.random.default_rng([self._seed, epoch.number]).permutation(len(self._pool))
        return [self._pool[place] for place in order if self._pool[place].index not in skipped]
