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
            guess = int(action) if action.strip().isdecimal() else 0
            if guess == self._number:
                return Reply("", 1.0, done=True)
            return Reply("higher\n" if guess < self._number else "lower\n", 0.0, done=False)

Episodes may begin alike, as these do: each seed is an episode of its own. Where enough of them begin differently, those
that begin as one that is held out for evaluation are not trained on.

It runs in the trainer's process, one instance for each episode, so it keeps the state of its own episode only.

Instances are asked at the same time, in up to `environment.threads` threads, so that slow tools are not waited for one
after the other. So what instances share (a class attribute, a connection, a file) must bear that. No instance is ever
called by two threads at once, but its calls may come from different ones: what belongs to one thread, such as an SQLite
connection or a signal handler, must not outlive a call. With `environment.threads: 1` only one instance is called at a
time; where `environment.turns` is `together` that is on the thread that samples, the main one unless rollouts are made
ahead.

A step that never answers holds up its rollout, so an environment bounds what it waits for; what takes more than a
minute is logged with its turn and the seed of its episode. What `reset` or `step` raises ends the run, as clearly.
"""

from __future__ import annotations

from ppod_trainer.environments.base import Environment, EnvironmentType, Reply
from ppod_trainer.environments.loading import load_environment

__all__ = ["Environment", "EnvironmentType", "Reply", "load_environment"]
