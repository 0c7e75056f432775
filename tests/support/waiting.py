"""An environment whose tool takes its time, whatever the policy says; `support.copying` has a random one."""

from __future__ import annotations

import random
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ppod_trainer.environments import Reply
from support.copying import LETTERS, SIGN

_LOOK_S = 0.05


class WaitingParameters(BaseModel):
    """How long it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shortest_s: float = Field(default=0.001, gt=0)
    longest_s: float = Field(default=0.02, gt=0)
    most_turns: int = Field(default=4, ge=1)
    stuck_file: Path | None = Field(default=None, description="while it is there no step returns")
    broken_file: Path | None = Field(default=None, description="while it is there every step fails")


class Waiting:
    """Each step takes a time, and the episode a number of turns, that the seed determines.

    Waits are spread evenly over their logarithm: of 50 ms to 1 s the median is 0.22 s, and the mean 0.32 s.
    """

    parameters_type = WaitingParameters
    # So that nearly every turn of a random policy is ended, and few are cut off.
    stop = tuple(LETTERS)

    def __init__(self, parameters: WaitingParameters) -> None:
        self._parameters = parameters
        self._draw = random.Random()
        self._turns_left = 0

    def reset(self, seed: int) -> str:
        self._draw = random.Random(seed)
        self._turns_left = self._draw.randint(1, self._parameters.most_turns)
        return "".join(self._draw.choice(LETTERS) for _ in range(3)) + SIGN

    def step(self, action: str) -> Reply:
        parameters = self._parameters
        if parameters.broken_file is not None and parameters.broken_file.exists():
            raise ConnectionError("the tool's server is away")
        while parameters.stuck_file is not None and parameters.stuck_file.exists():
            met_file(parameters.stuck_file).touch()
            time.sleep(_LOOK_S)
        time.sleep(parameters.shortest_s * (parameters.longest_s / parameters.shortest_s) ** self._draw.random())
        self._turns_left -= 1
        return Reply(SIGN, float("a" in action), done=not self._turns_left)


def met_file(stuck_file: Path) -> Path:
    """Where a step tells that it is stuck."""
    return stuck_file.with_suffix(".met")
