"""Asking environments, several at the same time."""

from __future__ import annotations

import threading
from functools import partial
from typing import SupportsFloat, cast

import numpy as np

from ppod_trainer.environments.base import Environment, Reply
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.errors import EnvironmentReplyError
from ppod_trainer.threads import at_once

_LARGEST_REWARD = float(np.finfo(np.float32).max)


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
        """A new environment, at the beginning of the episode that this seed determines, and the episode's prompt.

        Raises:
            EnvironmentReplyError: the prompt is no text.
        """
        with self._room:
            environment = self._make()
            prompt = cast(object, environment.reset(seed))
        if not isinstance(prompt, str):
            raise _failure(environment, f"reset({seed}) returned {prompt!r}", "a text")
        return environment, prompt

    def step(self, environment: Environment, action: str) -> Reply:
        """What an environment answers to a turn.

        Raises:
            EnvironmentReplyError: that is no reply, or one whose reward or observation is none.
        """
        with self._room:
            reply = cast(object, environment.step(action))
        if not isinstance(reply, Reply):
            raise _failure(environment, f"step returned {reply!r}", "a Reply")
        if not _is_finite(reply.reward):
            raise _failure(environment, f"step returned the reward {reply.reward!r}", "a finite number")
        observation = cast(object, reply.observation)
        if not reply.done and not isinstance(observation, str):
            raise _failure(environment, f"step returned the observation {observation!r}", "a text")
        return reply

    def prompts(self, episodes: int) -> list[str]:
        """The prompts of the episodes of seeds 0 to `episodes` - 1."""
        return at_once([partial(self._prompt, seed) for seed in range(episodes)], self.threads)

    def _prompt(self, seed: int) -> str:
        return self.begin(seed)[1]


def _is_finite(reward: object) -> bool:
    """Whether it is a number, as float32, which rollouts keep it in."""
    if not isinstance(reward, SupportsFloat):
        return False
    try:
        return abs(float(reward)) <= _LARGEST_REWARD
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # What arrays and tensors of several numbers raise, and integers beyond all floats.
        return False


def _failure(environment: Environment, found: str, expected: str) -> EnvironmentReplyError:
    return EnvironmentReplyError(f"environment {type(environment).__name__}: {found}, expected {expected}")
