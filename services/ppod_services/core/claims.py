"""Those who ask for the model to themselves: new weights, a new model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from ppod_services.core.batch_run import Pause

JobT = TypeVar("JobT")


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    pause: Pause
    run: Callable[[], None]


class Claims:
    """Jobs that wait for the model, in their order. They are made in any thread and run in the model's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Claim] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def abort(self) -> bool:
        """Whether one of them wants sequences under way handed back unfinished."""
        with self._lock:
            return any(claim.pause is Pause.ABORT for claim in self._waiting)

    def add(self, job: Callable[[], JobT], pause: Pause) -> Future[JobT]:
        """Queue a job; its future can be cancelled until it begins, and then holds up nobody any more."""
        future: Future[JobT] = Future()
        claim = _Claim(pause, lambda: _fulfil(future, job))
        with self._lock:
            self._waiting.append(claim)
        future.add_done_callback(lambda _: self._forget(claim))
        return future

    def run(self, pauses: frozenset[Pause] = frozenset(Pause)) -> None:
        """Run those at the head of the queue that make do with these pauses."""
        while (claim := self._next(pauses)) is not None:
            claim.run()

    def _forget(self, claim: _Claim) -> None:
        """Drop one whose future is done; where it was not cancelled, it was taken out before it ran."""
        with self._lock, suppress(ValueError):
            self._waiting.remove(claim)

    def _next(self, pauses: frozenset[Pause]) -> _Claim | None:
        with self._lock:
            if self._waiting and self._waiting[0].pause in pauses:
                return self._waiting.popleft()
            return None


class _Captured(Generic[JobT]):
    """Sends what a block raises to a future: it is for whoever awaits that, and no reason to end the batch."""

    def __init__(self, future: Future[JobT]) -> None:
        self._future = future

    def __enter__(self) -> Future[JobT]:
        return self._future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._future.set_exception(error)
        return True


def _fulfil(future: Future[JobT], job: Callable[[], JobT]) -> None:
    if future.set_running_or_notify_cancel():
        with _Captured(future):
            future.set_result(job())
