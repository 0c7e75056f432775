"""A reward for responses that match a regular expression."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from ppod_models.configuration import ConfigModel
from ppod_services.reward.functions import FunctionSample

_FLAGS = {"ignore_case": re.IGNORECASE, "multiline": re.MULTILINE, "dot_all": re.DOTALL, "verbose": re.VERBOSE}


class RegularExpressionParameters(ConfigModel):
    """What to look for."""

    pattern: str = Field(min_length=1, description="in the syntax of Python's re")
    mode: Literal["search", "full", "count"] = Field(
        default="search", description="search: anywhere; full: the whole response; count: the number of matches"
    )
    flags: tuple[Literal["ignore_case", "multiline", "dot_all", "verbose"], ...] = ()
    match: float = Field(default=1.0, description="score of a match; with count, of each match")
    no_match: float = Field(default=0.0, description="score where nothing matches")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class RegularExpression:
    """`match` or `no_match`. A pattern that backtracks for ever is stopped by the reward's time limit."""

    parameters_type = RegularExpressionParameters
    needs_references = False

    def __init__(self, parameters: RegularExpressionParameters) -> None:
        self._parameters = parameters
        flags = re.NOFLAG
        for name in parameters.flags:
            flags |= _FLAGS[name]
        self._pattern = re.compile(parameters.pattern, flags)

    def score(self, sample: FunctionSample) -> float:
        """Score of a match, or of none."""
        wanted = self._parameters
        match wanted.mode:
            case "count":
                matches = sum(1 for _ in self._pattern.finditer(sample.response))
                return wanted.match * matches if matches else wanted.no_match
            case "full":
                found = self._pattern.fullmatch(sample.response)
            case "search":
                found = self._pattern.search(sample.response)
        return wanted.no_match if found is None else wanted.match
