"""A reward for responses whose answer is the reference's."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from pydantic import Field, field_validator

from ppod_models.configuration import ConfigModel
from ppod_services.reward.functions import FunctionSample

_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")


class ExactAnswerParameters(ConfigModel):
    """Where the answer stands, and how strictly it is compared."""

    pattern: str | None = Field(
        default=None,
        description="regular expression whose last match in the response holds the answer in its first group, such as "
        r"'####\s*(.+)'; none: the whole response is the answer",
    )
    reference_pattern: str | None = Field(
        default=None,
        description="the same for references that hold more than the answer, such as GSM8K's solutions; a reference "
        "that it does not match, or none: the whole reference is the answer",
    )
    ignore_case: bool = False
    numbers: bool = Field(default=False, description="whether 1,000 and 1000.0 are the same answer")
    correct: float = Field(default=1.0, description="score of a right answer")
    wrong: float = Field(default=0.0, description="score of a wrong answer, or of none")

    @field_validator("pattern", "reference_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("needs a group around the answer")
        return pattern


class ExactAnswer:
    """`correct` where the answer equals the reference, white space at its ends and runs of it aside."""

    parameters_type = ExactAnswerParameters
    needs_references = True

    def __init__(self, parameters: ExactAnswerParameters) -> None:
        self._parameters = parameters
        self._pattern = _compiled(parameters.pattern)
        self._reference_pattern = _compiled(parameters.reference_pattern)

    def score(self, sample: FunctionSample) -> float:
        """Score of a right or a wrong answer."""
        answer = _answer(self._pattern, sample.response)
        reference = sample.reference or ""
        if (within := _answer(self._reference_pattern, reference)) is not None:
            reference = within
        right = answer is not None and self._plain(answer) == self._plain(reference)
        return self._parameters.correct if right else self._parameters.wrong

    def _plain(self, answer: str) -> str | Decimal:
        text = " ".join(answer.split())
        number = _number(text) if self._parameters.numbers else None
        if number is not None:
            return number
        return text.casefold() if self._parameters.ignore_case else text


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else re.compile(pattern)


def _answer(pattern: re.Pattern[str] | None, text: str) -> str | None:
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    return matches[-1].group(1) if matches else None


def _number(text: str) -> Decimal | None:
    """The number that a text is, to its last digit: as floats, integers from 2**53 on equal their neighbours.

    Commas are left out where they part thousands: "4,2" is not 42. Nor is "4_2", which Python would read so.
    """
    plain = text.replace(",", "") if _GROUPED.fullmatch(text) else text.replace("_", "?")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
