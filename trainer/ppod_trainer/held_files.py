"""Which shared files replicas may serve from: those must not be written to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ppod import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PpodError, ResourceExhausted
from ppod.client import WeightStatus

_REFUSALS = (InvalidArgument, FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted)
"""Errors after which a replica certainly holds nothing of what was pushed."""


class HeldFiles:
    """What each replica holds, by what it answered: it is not asked before every push."""

    def __init__(self) -> None:
        self._held: dict[str, set[str]] = {}
        self._prepared: dict[str, str] = {}
        self._silent: set[str] = set()

    def uris(self) -> set[str]:
        """Files that a replica holds or may hold."""
        return set().union(*self._held.values())

    def pushed(self, uri: str, outcomes: Mapping[str, PpodError | None]) -> None:
        """These replicas were told of a file.

        One that does not answer may have taken it before it fell silent; what comes after that it did not take.
        """
        for target, error in outcomes.items():
            if error is None:
                self._prepared[target] = uri
            if error is None or (not isinstance(error, _REFUSALS) and target not in self._silent):
                self._held.setdefault(target, set()).add(uri)
            if error is not None:
                self._silent.add(target)

    def committed(self, target: str) -> None:
        """A replica serves what it prepared last; what it held before is free."""
        self._silent.discard(target)
        if target in self._prepared:
            self._held[target] = {self._prepared[target]}

    def keep(self, targets: Collection[str]) -> None:
        """These are all replicas that are left: whoever is gone holds nothing any more."""
        for target in set(self._held) - set(targets):
            del self._held[target]
            self._prepared.pop(target, None)
            self._silent.discard(target)

    def told(self, target: str, status: WeightStatus) -> None:
        """A replica said itself what it holds."""
        self._silent.discard(target)
        self._held[target] = set(status.held_uris)
