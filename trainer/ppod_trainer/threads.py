"""Calls that are made at the same time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextvars import copy_context
from functools import partial
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
            # No pool of concurrent.futures: the process would not end before its calls do, be they stuck.
            threading.Thread(target=_work, args=(waiting,), name=f"at-once-{number}", daemon=True).start()
        done, _ = wait(results, return_when=FIRST_EXCEPTION)
        return [result.result() for result in results if result in done]
    finally:
        # Something is left where whoever waits was interrupted.
        waiting.clear()


class _Settles(Generic[ResultT]):
    """Hands what its block raises to whoever waits for the result, as an executor does; no further call begins then."""

    def __init__(self, result: Future[ResultT], waiting: deque[_Waiting[ResultT]]) -> None:
        self._result = result
        self._waiting = waiting

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._waiting.clear()
            self._result.set_exception(error)
        return error is not None


def _work(waiting: deque[_Waiting[ResultT]]) -> None:
    while waiting:
        try:
            result, call = waiting.popleft()
        except IndexError:  # another thread took the last one
            return
        with _Settles(result, waiting):
            result.set_result(call())
