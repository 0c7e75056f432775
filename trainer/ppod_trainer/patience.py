"""Waiting for services that are there, but refuse for now: a quota is spent, or a queue is full."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ppod import ResourceExhausted
from ppod_trainer.stopping import StopSignal

log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

_LOOK_S = 0.2
"""How often a wait looks whether the run was told to stop: it may not be in the thread that a signal breaks off."""


class Patience:
    """Asks a service again when it says to come again. Its client does so within a call's deadline, and no longer.

    A question alone, and not all that a step or an evaluation asks: what was answered before would be paid for again.

    Args:
        timeout_s: longest wait for the answer to a question; 0: none.
        stop: ends a wait.
    """

    def __init__(self, timeout_s: float = 0.0, stop: StopSignal | None = None) -> None:
        self._timeout_s = timeout_s
        self._stop = stop

    def ask(self, question: Callable[[], AnswerT]) -> AnswerT:
        """The answer.

        Raises:
            ResourceExhausted: no time makes room for it, or not in time; or the run was told to stop. Else what the
            question raises.
        """
        until: float | None = None
        while True:
            try:
                return question()
            except ResourceExhausted as error:
                now = time.monotonic()
                if until is None:
                    until = now + self._timeout_s
                again = now + error.retry_after_s
                if not now < again < until:
                    raise
                log.warning("waiting up to %g s for a service: %s", until - now, error)
                if not self._wait_until(again):
                    raise

    def _wait_until(self, again: float) -> bool:
        """False: the run was told to stop."""
        while (left_s := again - time.monotonic()) > 0:
            if self._stop is not None and self._stop.received is not None:
                return False
            time.sleep(min(left_s, _LOOK_S))
        return True
