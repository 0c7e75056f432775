"""The rollouts of coming steps, made while this step trains, and how old they may get.

With `ahead` n the rollouts of step k + n are begun when step k is. They are made by the weights that serve then, those
of version v_k or a newer one, and trained on at v_(k+n): n versions old at most. With n = 0 each step waits for those
of its own weights.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from opentelemetry import trace

from ppod_trainer.metrics import StepTimer
from ppod_trainer.rollouts import Rollout, ScoredRollout


class Collects(Protocol):
    """Makes the rollouts of a step; called in a thread of its own when steps overlap."""

    def generate(self, step: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        """Sample with exactly this version, or with None of whichever serve."""
        ...

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer) -> list[ScoredRollout]:
        """Ask reward and reference."""
        ...


@dataclass(frozen=True, slots=True)
class Collected:
    """A step's rollouts, and the seconds of each phase of their making."""

    rollouts: list[ScoredRollout]
    seconds: dict[str, float]


class RolloutPipeline:
    """Hands out the rollouts of each step, and makes those of coming ones in the background.

    Args:
        collects: makes them.
        ahead: how many steps before their own they are begun.
        steps: the run's; nothing is made for later ones.
        mixes: whether new weights may come while rollouts are generated, which then are of several versions.
    """

    def __init__(self, collects: Collects, *, ahead: int, steps: int, mixes: bool) -> None:
        self.version = 0
        self._collects = collects
        self._ahead = ahead
        self._steps = steps
        self._mixes = mixes
        self._generating = threading.Lock()
        self._scoring = threading.Lock()
        self._pending: dict[int, Future[Collected]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")

    def take(self, step: int) -> Collected:
        """Wait for a step's rollouts; raises what making them raised."""
        if not self._ahead:
            return self._make(step)
        for coming in range(step, min(step + self._ahead + 1, self._steps)):
            if coming not in self._pending:
                self._pending[coming] = self._pool.submit(self._make, coming)
        return self._pending.pop(step).result()

    @contextmanager
    def new_weights(self, version: int) -> Generator[None]:
        """Put weights of this version into service within the block: while nothing is generated, unless it may mix."""
        if self._mixes:
            yield
        else:
            with self._generating:
                yield
        self.version = version

    @contextmanager
    def new_reference(self) -> Generator[None]:
        """Replace the reference within the block, while no rollouts are scored."""
        with self._scoring:
            yield

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> Collected:
        timer = StepTimer()
        with timer.phase("rollout"):
            trace.get_current_span().set_attribute("ppo.step", step + 1)
            rollouts = self._generate(step, timer)
            with self._scoring:
                scored = self._collects.score(rollouts, timer)
        return Collected(scored, timer.seconds)

    def _generate(self, step: int, timer: StepTimer) -> list[Rollout]:
        if self._mixes:
            return self._collects.generate(step, None, timer)
        with self._generating:
            return self._collects.generate(step, self.version, timer)
