"""Which weight versions hold the policy after which update: what age of a sample is counted in."""

from __future__ import annotations

from bisect import insort

import numpy as np
import numpy.typing as npt

Ages = npt.NDArray[np.int64]

_NEVER = np.iinfo(np.int64).max


class PolicyVersions:
    """Counts the updates that lie between two weight versions.

    Most updates take one version. But what was pushed again, because a service was away, is the same policy under a
    later version; and the base of an adapter has a version too, which is no policy of this run. Nor is what a replica
    was started with, or was given by somebody else: a version that was never pushed.
    """

    def __init__(self) -> None:
        self._updates: list[int] = []
        self._bases: set[int] = set()
        self._pushed: tuple[int, int] | None = None

    @property
    def newest(self) -> int:
        """The last version that was put into service, or was to be; 0 before the first one."""
        pushed = 0 if self._pushed is None else self._pushed[1]
        return max(pushed, *self._bases, 0)

    def pushed(self, weight_version: int) -> None:
        """The policy is put into service under this version."""
        first, last = self._pushed or (weight_version, weight_version)
        self._pushed = min(first, weight_version), max(last, weight_version)

    def updated(self, weight_version: int) -> None:
        """From this version on the policy has had one more update."""
        insort(self._updates, weight_version)

    def base(self, weight_version: int) -> None:
        """This version is an adapter's base alone: whatever it samples is too old."""
        self._bases.add(weight_version)

    def ages(self, versions: npt.NDArray[np.int64]) -> Ages:
        """How many updates followed on these versions, whatever their shape; no policy of this run is older than all.

        Before the first push all versions count as the run's.
        """
        ages = len(self._updates) - np.searchsorted(self._updates, versions, side="right").astype(np.int64)
        foreign = np.isin(versions, list(self._bases))
        if self._pushed is not None:
            first, last = self._pushed
            foreign |= (versions < first) | (versions > last)
        return np.where(foreign, _NEVER, ages)
