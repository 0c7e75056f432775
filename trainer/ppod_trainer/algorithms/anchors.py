"""What the policy had read before each of its turns, as numbers: equal texts have equal numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppod_trainer.rollouts import Rollout, TurnArray


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """For each rollout int64 [T], T its response's length: a number on each action token, -1 elsewhere.

    Attributes:
        contexts: of all that precedes the turn, the prompt included.
        observations: of what the policy read since its last turn; before the first turn, the prompt.
    """

    contexts: list[TurnArray]
    observations: list[TurnArray]


def read_anchors(rollouts: Sequence[Rollout]) -> Anchors:
    """The anchors of a step's rollouts."""
    numbers: dict[bytes, int] = {}
    contexts: list[TurnArray] = []
    observations: list[TurnArray] = []
    for rollout in rollouts:
        context, observation = np.full_like(rollout.turns, -1), np.full_like(rollout.turns, -1)
        prompt, tokens = len(rollout.prompt.token_ids), rollout.tokens
        read_from = 0
        for turn in range(int(rollout.turns.max()) + 1):
            (own,) = np.nonzero(rollout.turns == turn)
            begin = prompt + int(own[0])
            # The key says which of the two it is: a first turn has the same context as observation.
            context[own] = numbers.setdefault(b"c" + tokens[:begin].tobytes(), len(numbers))
            observation[own] = numbers.setdefault(b"o" + tokens[read_from:begin].tobytes(), len(numbers))
            read_from = prompt + int(own[-1]) + 1
        contexts.append(context)
        observations.append(observation)
    return Anchors(contexts, observations)
