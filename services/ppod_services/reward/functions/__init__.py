"""Reward functions in Python, and what a package must offer to add its own.

A function is a class, named by an entry point of the group `ppod.rewards`:

    [project.entry-points."ppod.rewards"]
    shouting = "my_package.rewards:Shouting"

    class ShoutingParameters(pydantic.BaseModel):
        penalty: float = 1.0

    class Shouting:
        parameters_type = ShoutingParameters
        needs_references = False

        def __init__(self, parameters: ShoutingParameters) -> None:
            self._penalty = parameters.penalty

        def score(self, sample: FunctionSample) -> float:
            return -self._penalty * sample.response.count("!")

It runs in processes of its own, so it may block and need not be thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class FunctionSample:
    """What a function sees of one sequence.

    Attributes:
        prompt: what stands before the response; of a conversation all earlier turns, as "role: content" lines.
        response: what is scored.
        reference: the right answer, where the request carries one.
    """

    prompt: str
    response: str
    reference: str | None = None


class RewardFunction(Protocol):
    """A function with its parameters."""

    def score(self, sample: FunctionSample) -> float:
        """A finite score. Raising ends the process and fails the request with an error that names the sample."""
        ...


class RewardFunctionType(Protocol):
    """The class that an entry point names."""

    parameters_type: ClassVar[type[BaseModel]]
    """A pydantic model of the keys under `parameters`."""

    needs_references: ClassVar[bool]
    """Whether a request without `references` is refused."""

    # Each class takes its own parameters type, which no common signature can name.
    def __call__(self, parameters: Any, /) -> RewardFunction:
        """Make the function; `parameters` is an instance of `parameters_type`."""
        ...
