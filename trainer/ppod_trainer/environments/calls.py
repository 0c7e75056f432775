"""Asking environments, several at the same time."""

from __future__ import annotations

import threading
from functools import partial

from ppod_trainer.environments.base import Environment, Reply
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.threads import at_once


class EnvironmentCalls:
    """Makes and asks environments of one kind, as many at a time as there are threads, whoever asks.

    Args:
        environment: makes them.
        threads: most that are asked at the same time.

    Attributes:
        stop: texts that end a turn.
        threads: as given.
    """

    def __init__(self, environment: LoadedEnvironment, threads: int) -> None:
        self.stop = environment.stop
        self.threads = threads
        self._make = environment.make
        # Besides at_once's bound: episodes that go on by themselves have more threads, and two callers may sample.
        self._room = threading.Semaphore(threads)

    def begin(self, seed: int) -> tuple[Environment, str]:
        """A new environment, at the beginning of the episode that this seed determines, and the episode's prompt."""
        with self._room:
            environment = self._make()
            return environment, environment.reset(seed)

    def step(self, environment: Environment, action: str) -> Reply:
        """What an environment answers to a turn."""
        with self._room:
            return environment.step(action)

    def prompts(self, episodes: int) -> list[str]:
        """The prompts of the episodes of seeds 0 to `episodes` - 1."""
        return at_once([partial(self._prompt, seed) for seed in range(episodes)], self.threads)

    def _prompt(self, seed: int) -> str:
        return self.begin(seed)[1]
