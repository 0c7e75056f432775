"""Errors of the trainer itself; errors of the services are `ppod.errors`."""

from __future__ import annotations


class TrainerError(Exception):
    """Root of the trainer's errors: training cannot go on, and the message says why and what to do."""


class PromptError(TrainerError):
    """The prompts cannot be read or used."""


class NonFiniteLossError(TrainerError):
    """A loss or gradient norm is NaN or infinite: the update is not applied."""


class ServiceMismatchError(TrainerError):
    """A service does not fit the policy: another tokenizer, a smaller limit, another weight version."""


class WeightPushError(TrainerError):
    """A replica of generation did not get new weights; what it serves is its old version."""


class CheckpointError(TrainerError):
    """A checkpoint is missing, unreadable or of another configuration."""


class StopRequestedError(TrainerError):
    """SIGINT or SIGTERM came in; the run ends at the last whole step."""
