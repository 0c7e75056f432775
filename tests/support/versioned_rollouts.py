"""Rollouts that tell which version they were asked of."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ppod_trainer.metrics import StepTimer
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn
from ppod_trainer.selection import Selected


class Services:
    """Makes rollouts whose only token is the version that was asked for; remembers what happened when."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []
        self.generating = False
        self.scoring = False
        self.slow_s = 0.0
        self.broken = -1
        self.further: dict[int, int] = {}
        self.numbers: list[int] = []
        self.never_full = False
        self.score_begun: defaultdict[int, threading.Event] = defaultdict(threading.Event)

    @property
    def max_rounds(self) -> int:
        return 1 + max(self.further.values(), default=0)

    def generate(self, step: int, number: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        self.asked.append((step, policy_version))
        self.numbers.append(number)
        with timer.phase("generate"), self._flag("generating"):
            time.sleep(self.slow_s)
            if step == self.broken:
                raise RuntimeError("generation broke")
        version = np.array([policy_version or 0])
        turn = Turn(
            version.astype(np.int32), np.zeros(1, dtype=np.float32), version, truncated=False, hides_stop_token=False
        )
        return [Rollout.of_turn(Prompt(step, version.astype(np.int32)), turn, step)]

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer) -> list[ScoredRollout]:
        with timer.phase("score"), self._flag("scoring"):
            for rollout in rollouts:
                self.score_begun[rollout.prompt.index].set()
            time.sleep(self.slow_s)
        return [ScoredRollout(rollout, 0.0, np.zeros(1)) for rollout in rollouts]

    def select(self, step: int, rounds: Sequence[Sequence[ScoredRollout]]) -> Selected:
        kept = [one for samples in rounds for one in samples]
        full = len(rounds) > self.further.get(step, 0) and not self.never_full
        return Selected(kept, full, {"rounds": float(len(rounds))})

    @contextmanager
    def _flag(self, name: str) -> Iterator[None]:
        setattr(self, name, True)
        yield
        setattr(self, name, False)
