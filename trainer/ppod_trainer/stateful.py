"""What a checkpoint keeps besides weights and optimizer."""

from __future__ import annotations

from typing import Protocol

from pydantic import JsonValue

JsonState = dict[str, JsonValue]


class Stateful(Protocol):
    """Part of a run that changes from step to step. All that the next step depends on is in its state."""

    def state(self) -> JsonState:
        """What it holds, as JSON values; floats survive exactly."""
        ...

    def restore(self, state: JsonState) -> None:
        """Go on from a state that `state` gave. Raises KeyError or TypeError where it is not one."""
        ...
