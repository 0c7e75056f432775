"""A reward for responses of the length asked for."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel
from ppod_services.reward.functions import FunctionSample


class LengthParameters(ConfigModel):
    """Which lengths are right."""

    unit: Literal["characters", "words"] = Field(default="characters", description="words are what spaces part")
    minimum: int = Field(default=0, ge=0, description="shortest right length")
    maximum: int | None = Field(default=None, ge=0, description="longest right length; none: any")
    per_unit: float = Field(default=1.0, gt=0, description="what each unit too few or too many costs")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum must be at least minimum, {self.minimum}, found {self.maximum}")
        return self


class Length:
    """0 for a right length, minus `per_unit` for each unit too few or too many."""

    parameters_type = LengthParameters
    needs_references = False

    def __init__(self, parameters: LengthParameters) -> None:
        self._parameters = parameters

    def score(self, sample: FunctionSample) -> float:
        """At most 0."""
        wanted = self._parameters
        length = len(sample.response.split()) if wanted.unit == "words" else len(sample.response)
        missing = max(0, wanted.minimum - length)
        excess = 0 if wanted.maximum is None else max(0, length - wanted.maximum)
        return 0.0 - wanted.per_unit * (missing + excess)
