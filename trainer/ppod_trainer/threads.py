"""Calls on threads that the end of the process does not wait for, be they stuck: no pool of concurrent.futures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")
_Waiting = tuple[Future[ResultT], Callable[[], ResultT]]


def at_once(calls: Sequence[Callable[[], ResultT]], threads: int) -> list[ResultT]:
    """Make all calls, at most `threads` at a time; what each returned, in their order.

    A lone call, or with one thread each after the other, is made on this thread.

    Raises:
        BaseException: the first error that a call raises, as soon as it does. What has not begun by then never will;
            what is under way is not waited for, and what comes of it is lost.
    """
    if min(threads, len(calls)) <= 1:
        return [call() for call in calls]
    results: list[Future[ResultT]] = [Future() for _ in calls]
    # With this thread's context, so that what is called belongs to the step's trace.
    waiting = deque(zip(results, [partial(copy_context().run, call) for call in calls], strict=True))
    try:
        for number in range(min(threads, len(calls))):
            threading.Thread(target=_work, args=(waiting,), name=f"at-once-{number}", daemon=True).start()
        done, _ = wait(results, return_when=FIRST_EXCEPTION)
        return [result.result() for result in results if result in done]
    finally:
        # Something is left where whoever waits was interrupted.
        waiting.clear()


class Background:
    """Makes calls one after the other, on a thread of its own.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], ResultT]) -> Future[ResultT]:
        """Make a call after those before it, unless its future is cancelled by then."""
        result: Future[ResultT] = Future()

        def make() -> None:
            if result.set_running_or_notify_cancel():
                with _Settles(result):
                    result.set_result(call())

        self._waiting.put(make)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return result

    def close(self) -> None:
        """Let the thread end, once it has made the calls that nobody cancelled."""
        self._waiting.put(None)

    def _work(self) -> None:
        while (make := self._waiting.get()) is not None:
            make()


class _Settles(Generic[ResultT]):
    """Hands what its block raises to whoever waits for the result, as an executor does."""

    def __init__(self, result: Future[ResultT], failed: Callable[[], None] = lambda: None) -> None:
        self._result = result
        self._failed = failed

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._failed()
            self._result.set_exception(error)
        return error is not None


def _work(waiting: deque[_Waiting[ResultT]]) -> None:
    while waiting:
        try:
            result, call = waiting.popleft()
        except IndexError:  # another thread took the last one
            return
        # No further call begins where one failed.
        with _Settles(result, waiting.clear):
            result.set_result(call())
