"""Asking environments, several at the same time."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from types import TracebackType
from typing import SupportsFloat, cast

import numpy as np

from ppod_trainer.environments.base import Environment, Reply
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.errors import EnvironmentReplyError
from ppod_trainer.threads import at_once

_LARGEST_REWARD = float(np.finfo(np.float32).max)
_PATIENCE_S = 60.0
"""An answer that takes longer is logged: nothing else tells a tool that hangs from a step that is slow."""

log = logging.getLogger(__name__)


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
        self._slow = _SlowAnswers()

    def begin(self, seed: int) -> tuple[Environment, str]:
        """A new environment, at the beginning of the episode that this seed determines, and the episode's prompt.

        Raises:
            EnvironmentReplyError: the prompt is no text.
        """
        with self._room:
            environment = self._make()
            with _Question(self._slow, environment, f"reset({seed})"):
                prompt = cast(object, environment.reset(seed))
        if not isinstance(prompt, str):
            raise _failure(environment, f"reset({seed}) returned {prompt!r}", "a text")
        return environment, prompt

    def step(self, environment: Environment, action: str, turn: str) -> Reply:
        """What an environment answers to a turn; `turn` says which one that is, in messages.

        Raises:
            EnvironmentReplyError: that is no reply, or one whose reward or observation is none.
        """
        with self._room, _Question(self._slow, environment, turn):
            return _checked(environment, environment.step(action))

    def prompts(self, episodes: int) -> list[str]:
        """The prompts of the episodes of seeds 0 to `episodes` - 1."""
        return at_once([partial(self._prompt, seed) for seed in range(episodes)], self.threads)

    def _prompt(self, seed: int) -> str:
        return self.begin(seed)[1]


class _SlowAnswers:
    """Logs questions that are long without an answer, on one thread: one for each would cost more than most answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[_Question, float] = {}
        self._watching = False

    def expect(self, question: _Question) -> None:
        """Log a question unless it is answered in time."""
        with self._lock:
            self._due[question] = time.monotonic() + _PATIENCE_S
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="slow-answers", daemon=True).start()

    def answered(self, question: _Question) -> None:
        """Whatever the answer."""
        with self._lock:
            self._due.pop(question, None)

    def _watch(self) -> None:
        while self._watching:
            time.sleep(_PATIENCE_S / 20)
            with self._lock:
                now = time.monotonic()
                late = [question for question, due in self._due.items() if due <= now]
                for question in late:
                    del self._due[question]
                # Without anything to wait for the thread ends; the next question begins another.
                self._watching = bool(self._due)
            for question in late:
                log.warning("%s: no answer after %g s; the step waits: bound what it waits for", question, _PATIENCE_S)


class _Question:
    """While an environment is asked: is waited for, and noted in whatever the environment raises.

    Args:
        slow: who logs it where the answer takes long.
        environment: who is asked.
        what: the question, such as the turn.
    """

    def __init__(self, slow: _SlowAnswers, environment: Environment, what: str) -> None:
        self._slow = slow
        self._text = f"environment {type(environment).__name__}, {what}"

    def __str__(self) -> str:
        return self._text

    def __enter__(self) -> None:
        self._slow.expect(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slow.answered(self)
        if error is not None:
            error.add_note(self._text)


def _checked(environment: Environment, reply: object) -> Reply:
    if not isinstance(reply, Reply):
        raise _failure(environment, f"step returned {reply!r}", "a Reply")
    if not _is_finite(reply.reward):
        raise _failure(environment, f"step returned the reward {reply.reward!r}", "a finite number")
    observation = cast(object, reply.observation)
    if not reply.done and not isinstance(observation, str):
        raise _failure(environment, f"step returned the observation {observation!r}", "a text")
    return reply


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
