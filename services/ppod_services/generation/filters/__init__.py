"""Filters of completions, and what a package must offer to add its own.

A filter is a class, named by an entry point of the group `ppod.output_filters`:

    [project.entry-points."ppod.output_filters"]
    no_shouting = "my_package.filters:NoShouting"

    class NoShoutingParameters(pydantic.BaseModel):
        most: int = 3

    class NoShouting:
        parameters_type = NoShoutingParameters

        def __init__(self, parameters: NoShoutingParameters) -> None:
            self._most = parameters.most

        def reason(self, text: FilteredText) -> str | None:
            return "shouting" if text.completion.count("!") > self._most else None

Only filters that the service's configuration names are loaded. They run in a thread of their own, one completion at a
time, so they need not be thread-safe; but Python runs one thread at a time, so a slow one slows the whole service.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class FilteredText:
    """What a filter sees. Special tokens are left out.

    Attributes:
        prompt: what stands before the completion.
        completion: all of it, also what was sampled before it was resumed.
    """

    prompt: str
    completion: str


class OutputFilter(Protocol):
    """A filter with its parameters."""

    def reason(self, text: FilteredText) -> str | None:
        """Why the completion is withheld, in words that may reach the caller; None: it is not.

        Raising fails the request: what a filter could not judge is never sent.
        """
        ...


class OutputFilterType(Protocol):
    """The class that an entry point names."""

    parameters_type: ClassVar[type[BaseModel]]
    """A pydantic model of the keys under `parameters`."""

    # Each class takes its own parameters type, which no common signature can name.
    def __call__(self, parameters: Any, /) -> OutputFilter:
        """Make the filter; `parameters` is an instance of `parameters_type`."""
        ...
