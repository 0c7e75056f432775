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
        self._served: dict[str, set[str]] = {}  # what it serves from, or may since a commit that nobody heard of
        self._waiting: dict[str, set[str]] = {}  # what it prepared, or may have, and was never asked to commit
        self._prepared: dict[str, str] = {}  # what it said last that it prepared; not once it was committed
        self._silent: set[str] = set()

    def uris(self) -> set[str]:
        """Files that a replica holds or may hold."""
        return set().union(*self._served.values(), *self._waiting.values())

    def pushed(self, uri: str, outcomes: Mapping[str, PpodError | None]) -> None:
        """These replicas were told of a file.

        One that prepared it has let go of what it had prepared before: pushes that fail elsewhere, and are tried again,
        must not take a file each. One that does not answer may have taken it before it fell silent; what comes after
        that it did not take.
        """
        for target, error in outcomes.items():
            if error is None:
                self._prepared[target] = uri
                self._waiting[target] = {uri}
                continue
            if not isinstance(error, _REFUSALS) and target not in self._silent:
                self._waiting.setdefault(target, set()).add(uri)
            self._silent.add(target)

    def committed(self, target: str) -> None:
        """A replica serves what it prepared last; what it held before is free."""
        self._silent.discard(target)
        if target in self._prepared:
            self._served[target] = {self._prepared.pop(target)}
            self._waiting.pop(target, None)

    def may_have_committed(self, target: str) -> None:
        """A replica was asked to commit, and nobody knows whether it has, or still will."""
        self._served.setdefault(target, set()).update(self._waiting.pop(target, ()))
        self._prepared.pop(target, None)

    def keep(self, targets: Collection[str]) -> None:
        """These are all replicas that are left: whoever is gone holds nothing any more."""
        for target in (set(self._served) | set(self._waiting)) - set(targets):
            self._served.pop(target, None)
            self._waiting.pop(target, None)
            self._prepared.pop(target, None)
            self._silent.discard(target)

    def told(self, target: str, status: WeightStatus) -> None:
        """A replica that was asked to commit said itself what it holds."""
        self._silent.discard(target)
        self._served[target] = set(status.held_uris)
        self._waiting.pop(target, None)
        self._prepared.pop(target, None)
