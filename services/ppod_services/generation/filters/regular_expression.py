"""Withholds completions in which one of several regular expressions is found."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import Field, field_validator

from ppod_models.configuration import ConfigModel
from ppod_services.generation.filters import FilteredText


class RegularExpressionParameters(ConfigModel):
    """What to look for."""

    patterns: Mapping[str, str] = Field(
        min_length=1, description="by reason: a pattern in the syntax of Python's re, searched for in the completion"
    )
    ignore_case: bool = True

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: Mapping[str, str]) -> Mapping[str, str]:
        for reason, pattern in patterns.items():
            if not reason:
                raise ValueError("a reason is empty")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{reason}: not a regular expression: {error}") from error
        return patterns


class RegularExpression:
    """The reason of the first pattern that is found."""

    parameters_type = RegularExpressionParameters

    def __init__(self, parameters: RegularExpressionParameters) -> None:
        flags = re.IGNORECASE if parameters.ignore_case else re.NOFLAG
        self._patterns = {reason: re.compile(pattern, flags) for reason, pattern in parameters.patterns.items()}

    def reason(self, text: FilteredText) -> str | None:
        """The reason, or None."""
        return next((reason for reason, pattern in self._patterns.items() if pattern.search(text.completion)), None)
