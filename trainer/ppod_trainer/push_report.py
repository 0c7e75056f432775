"""What a push of weights took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PushReport:
    """What one push took.

    Attributes:
        sent_bytes: bytes of tensors that left the trainer, or that it wrote to files.
        prepare_s: seconds until the version was prepared everywhere.
        commit_s: seconds from then until it served everywhere.
        paused_s: longest time for which no batch could start on a replica.
        fallbacks: replicas that refused changes, or that a broadcast did not reach, and were sent whole weights.
        lost: replicas that did not get the version, where the run may go on without them.
    """

    sent_bytes: int
    prepare_s: float
    commit_s: float
    paused_s: float
    fallbacks: int
    lost: tuple[str, ...]

    def figures(self) -> dict[str, float]:
        """As a step's record holds them; what each name means: `metrics.GAUGES`."""
        return {
            "push/bytes": float(self.sent_bytes),
            "push/fallbacks": float(self.fallbacks),
            "push/lost": float(len(self.lost)),
            "seconds/push_prepare": self.prepare_s,
            "seconds/push_commit": self.commit_s,
            "seconds/push_pause": self.paused_s,
        }
