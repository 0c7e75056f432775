"""Notices that somebody gave a reward other weights: a shared service may replace a model while a run is paid by it."""

from __future__ import annotations

import logging

from ppod.client import ModelState

log = logging.getLogger(__name__)


class RewardVersion:
    """The version that a reward's scores are by; a line in the log tells of another one.

    The run goes on: who replaced a model may have meant to.

    Args:
        role: what the run has the reward for.
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._last: ModelState | None = None

    def see(self, state: ModelState) -> None:
        """Take note of what a reply tells."""
        last, self._last = self._last, state
        if last is not None and last.weight_version != state.weight_version:
            log.warning(
                "%s %s was replaced: scores are by version %d now, and were by version %d; those from before and those "
                "from now on are not of one scale",
                self._role,
                state.model,
                state.weight_version,
                last.weight_version,
            )
