"""Going on after a service went away for a while, as when its pod is moved."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ppod import DeadlineExceeded, FailedPrecondition, PpodError, ResourceExhausted, Unavailable
from ppod_trainer.connections import Connections
from ppod_trainer.errors import WeightPushError, with_notes
from ppod_trainer.stopping import StopSignal

log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

_PAUSE_S = 0.5
_LOOK_S = 1.0
"""How often a wait looks whether a signal came in, which would wait as long as the services stay away."""


class Recovery:
    """Waits for services, and gives them back what they lost.

    Args:
        connections: the run's services.
        timeout_s: longest wait; 0: none.
        stop: a signal ends a wait.
    """

    def __init__(self, connections: Connections, timeout_s: float, stop: StopSignal) -> None:
        self._connections = connections
        self._timeout_s = timeout_s
        self._stop = stop

    def ask(self, question: Callable[[], AnswerT]) -> AnswerT:
        """The answer to what only asks the services, asked again until they give it. Raises as `come_back`."""
        try:
            return question()
        except (PpodError, WeightPushError) as error:
            answers: list[AnswerT] = []
            self.come_back(error, lambda: answers.append(question()))
            return answers[0]

    def come_back(self, error: PpodError | WeightPushError, restore: Callable[[], None]) -> None:
        """Return when all services are ready and `restore` worked.

        Raises:
            The error that was given: it is none that time heals, time ran out, or a signal came in. A note tells what
            the services answered last.
        """
        until = time.monotonic() + self._timeout_s
        if not _heals(error) or not self._timeout_s:
            raise error
        log.warning("waiting up to %g s for the services: %s", self._timeout_s, with_notes(error))
        while True:
            try:
                self._connections.wait_ready(min(max(until - time.monotonic(), _PAUSE_S), _LOOK_S))
                restore()
            except (PpodError, WeightPushError) as latest:
                if not _heals(latest) or time.monotonic() >= until or self._stop.received is not None:
                    # The first trouble may be over by then, and another one in its place.
                    if str(latest) != str(error):
                        error.add_note(f"at last: {with_notes(latest)}")
                    raise error from latest
                time.sleep(_PAUSE_S)
            else:
                return


def _heals(error: BaseException) -> bool:
    """Whether it may be gone when a service is back: it was away or busy, or is there without the run's weights."""
    if isinstance(error, WeightPushError):
        causes = error.causes or (error.__cause__,)
        return all(cause is not None and _heals(cause) for cause in causes)
    if isinstance(error, FailedPrecondition):
        return error.what in ("weight_version", "base_version")
    if isinstance(error, ResourceExhausted):
        # Where a wait does not mend it, as a full disk, none is told.
        return error.retry_after_s > 0
    return isinstance(error, Unavailable | DeadlineExceeded)
