r"""Environments: what answers the policy between its turns, and what a package must offer to add its own.

An environment is a class, named by an entry point of the group `ppod.environments`:

    [project.entry-points."ppod.environments"]
    guessing = "my_package.environments:Guessing"

    class GuessingParameters(pydantic.BaseModel):
        highest: int = 100

    class Guessing:
        parameters_type = GuessingParameters
        stop = ("\n",)

        def __init__(self, parameters: GuessingParameters) -> None:
            self._highest = parameters.highest

        def reset(self, seed: int) -> str:
            self._number = random.Random(seed).randint(1, self._highest)
            return f"Guess a number from 1 to {self._highest}.\n"

        def step(self, action: str) -> Reply:
            guess = int(action) if action.strip().isdigit() else 0
            if guess == self._number:
                return Reply("", 1.0, done=True)
            return Reply("higher\n" if guess < self._number else "lower\n", 0.0, done=False)

It runs in the trainer's process, one instance for each episode, so it keeps the state of its own episode only.
"""

from __future__ import annotations

from ppod_trainer.environments.base import Environment, EnvironmentType, Reply
from ppod_trainer.environments.loading import load_environment

__all__ = ["Environment", "EnvironmentType", "Reply", "load_environment"]
