"""Errors of the trainer itself; errors of the services are `ppod.errors`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import grpc

from ppod import PpodError


def with_notes(error: BaseException) -> str:
    """Message and notes of an error: these tell what a caller alone knew, such as the service or the prompt."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


class TrainerError(Exception):
    """Root of the trainer's errors: training cannot go on, and the message says why and what to do."""


class PromptError(TrainerError):
    """The prompts cannot be read or used."""


class WithheldError(PpodError):
    """Generation's output filter withholds a completion; `sample` is its position in the request."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self, reason: str, sample: int) -> None:
        super().__init__(reason, sample)
        self.reason = reason
        self.sample = sample

    def __str__(self) -> str:
        return f"sample {self.sample}: generation's output filter withholds the completion: {self.reason}"


class EnvironmentLoadError(TrainerError):
    """An environment cannot be loaded, or its parameters are wrong."""


class EnvironmentReplyError(TrainerError):
    """An environment answered with something that is no prompt, or no reply that could be paid and read."""


class NonFiniteLossError(TrainerError):
    """A loss or gradient norm is NaN or infinite: the update is not applied."""


class TroubleError(TrainerError):
    """A step showed a trouble that the configuration stops the run for; the run is whole, and is saved."""


class ServiceMismatchError(TrainerError):
    """A service does not fit the policy: another tokenizer, a smaller limit, another weight version."""


class WeightPushError(TrainerError):
    """A replica of generation did not get new weights; what it serves is its old version.

    Attributes:
        causes: what went wrong on each replica that failed; empty where it is `__cause__` alone.
        committing: replicas that did not answer may put them into service yet, under their version.
    """

    def __init__(self, message: str, causes: Sequence[PpodError] = (), *, committing: bool = False) -> None:
        super().__init__(message)
        self.causes = tuple(causes)
        self.committing = committing


class CheckpointError(TrainerError):
    """A checkpoint is missing, unreadable or of another configuration."""


class RanksError(TrainerError):
    """The ranks of the trainer did not find each other, or lost each other."""


class OutputError(TrainerError):
    """Nobody reads what the trainer prints."""


class StopRequestedError(TrainerError):
    """SIGINT or SIGTERM came in; the run ends at the last whole step."""
