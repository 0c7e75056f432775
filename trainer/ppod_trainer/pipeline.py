"""The rollouts of coming steps, made while this step trains, and how old they may get.

With `ahead` n the rollouts of step k + n are begun when step k is. They are made by the weights that serve then, those
of version v_k or a newer one, and trained on at v_(k+n): n versions old at most. With n = 0 each step waits for those
of its own weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from opentelemetry import trace

from ppod_trainer.errors import WeightPushError
from ppod_trainer.metrics import StepTimer
from ppod_trainer.rollouts import Rollout, ScoredRollout
from ppod_trainer.selection import Selected
from ppod_trainer.threads import Background

_LOOK_S = 0.2
"""How often a wait for the end of generation looks whether a signal came in: a tool may be stuck."""


class Collects(Protocol):
    """Makes the rollouts of a step; called in a thread of its own when steps overlap."""

    @property
    def max_rounds(self) -> int:
        """Most rounds of sampling in a step."""
        ...

    def generate(self, step: int, number: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        """Sample a step's round (0 is the first) with exactly this version, or with None of whichever serve."""
        ...

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer) -> list[ScoredRollout]:
        """Ask reward and reference."""
        ...

    def select(self, step: int, rounds: Sequence[Sequence[ScoredRollout]]) -> Selected:
        """Of the rounds so far; where it is not full, another follows, up to `max_rounds`."""
        ...


@dataclass(frozen=True, slots=True)
class Collected:
    """A step's rollouts, the seconds of each phase of their making, and figures of their selection."""

    rollouts: list[ScoredRollout]
    seconds: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict[str, float])


class RolloutPipeline:
    """Hands out the rollouts of each step, and makes those of coming ones in the background.

    Args:
        collects: makes them.
        ahead: how many steps before their own they are begun.
        steps: the run's; nothing is made for later ones.
        mixes: whether new weights may come while rollouts are generated, which then are of several versions.
        stopping: whether the run was told to stop.
        fault: why a step's rollouts are of no use, which `take` raises; None: they are.
    """

    def __init__(
        self,
        collects: Collects,
        *,
        ahead: int,
        steps: int,
        mixes: bool,
        stopping: Callable[[], bool] = lambda: False,
        fault: Callable[[Collected], Exception | None] = lambda _: None,
    ) -> None:
        self.version = 0
        self._collects = collects
        self._ahead = ahead
        self._steps = steps
        self._mixes = mixes
        self._stopping = stopping
        self._fault = fault
        self._mistrusted = -1
        self._generating = threading.Lock()
        self._scoring = threading.Lock()
        self._pending: dict[int, Future[Collected]] = {}
        self._background = Background("rollouts")

    def take(self, step: int) -> Collected:
        """Wait for a step's rollouts; raises what making them raised, or their fault.

        Where they had a fault, those of the next call are of exactly the version that serves.
        """
        collected = self._made(step) if self._ahead else self._make(step)
        if (fault := self._fault(collected)) is not None:
            self._discard()
            self._mistrusted = step
            raise fault
        return collected

    def _made(self, step: int) -> Collected:
        """Wait for what is made in the background, and begin the steps behind it."""
        for coming in range(step, min(step + self._ahead + 1, self._steps)):
            if coming not in self._pending:
                self._pending[coming] = self._background.submit(partial(self._make, coming))
        future = self._pending.pop(step)
        wait([future])
        if future.exception() is not None:
            self._discard()
        return future.result()

    @contextmanager
    def new_weights(self, version: int) -> Generator[None]:
        """Put weights of this version into service within the block: while nothing is generated, unless it may mix.

        Raises:
            WeightPushError: the run was told to stop before what is being generated was there.
        """
        if self._mixes:
            yield
            self.version = version
        else:
            while not self._generating.acquire(timeout=_LOOK_S):
                if self._stopping():
                    raise WeightPushError("the run was told to stop while rollouts of coming steps were generated")
            try:
                yield
                # Before whoever waits may ask for a version.
                self.version = version
            finally:
                self._generating.release()

    @contextmanager
    def new_reference(self) -> Generator[None]:
        """Replace the reference within the block, while no rollouts are scored."""
        with self._scoring:
            yield

    def close(self) -> None:
        """Begin nothing more."""
        for future in self._pending.values():
            future.cancel()
        self._background.close()

    def _discard(self) -> None:
        """Forget what was begun after a step that failed: it may depend on that step's samples."""
        for future in self._pending.values():
            future.cancel()
        wait(self._pending.values())
        self._pending.clear()

    def _make(self, step: int) -> Collected:
        timer = StepTimer()
        with timer.phase("rollout"):
            trace.get_current_span().set_attribute("ppo.step", step + 1)
            selected = self._sample(step, timer)
        return Collected(selected.rollouts, timer.seconds, selected.figures)

    def _sample(self, step: int, timer: StepTimer) -> Selected:
        """Round after round until the step has what it wants; all of one version, unless versions may mix."""
        rounds: list[list[ScoredRollout]] = []
        with ExitStack() as generating:
            if not self._mixes:
                generating.enter_context(self._generating)
            # Whoever takes a step again puts no new weights into service before it is there.
            version = None if self._mixes and step != self._mistrusted else self.version
            while True:
                rollouts = self._collects.generate(step, len(rounds), version, timer)
                last = len(rounds) + 1 == self._collects.max_rounds
                if last:
                    generating.close()
                with self._scoring:
                    rounds.append(self._collects.score(rollouts, timer))
                selected = self._collects.select(step, rounds)
                if selected.full or last:
                    return selected
