"""What an environment is to the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to a turn.

    Attributes:
        observation: text that the policy reads before its next turn; never trained on. Not read when done.
        reward: for the turn, paid on its last token.
        done: whether the episode is over.
    """

    observation: str
    reward: float
    done: bool


class Environment(Protocol):
    """One episode. Other instances are called at the same time, this one never; see the package for what that asks."""

    def reset(self, seed: int) -> str:
        """Begin the episode that this seed determines; the text is its prompt."""
        ...

    def step(self, action: str) -> Reply:
        """Answer the text of a turn, special tokens left out; it may have been cut off at the token limit."""
        ...


class EnvironmentType(Protocol):
    """The class that an entry point names."""

    parameters_type: ClassVar[type[BaseModel]]
    """A pydantic model of the keys under `parameters`."""

    stop: ClassVar[tuple[str, ...]]
    """Texts that end a turn, besides the model's end-of-sequence tokens."""

    def __call__(self, parameters: BaseModel) -> Environment:
        """Make an environment."""
        ...
