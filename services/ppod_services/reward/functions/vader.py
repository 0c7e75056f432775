"""Sentiment by the VADER lexicon (Hutto and Gilbert, 2014)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppod_models.configuration import ConfigModel
from ppod_services.reward.functions import FunctionSample


class VaderParameters(ConfigModel):
    """Which of the lexicon's figures."""

    figure: Literal["compound", "pos", "neg", "neu"] = Field(
        default="compound", description="compound runs from -1 to 1; pos, neg and neu are shares of the text, 0 to 1"
    )


class Vader:
    """Sentiment of the response; exact and cheap, and blind to everything but words."""

    parameters_type = VaderParameters
    needs_references = False

    def __init__(self, parameters: VaderParameters) -> None:
        # The lexicon takes a moment to read, which only the processes that score should spend.
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415

        self._figure = parameters.figure
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, sample: FunctionSample) -> float:
        """The figure."""
        return float(self._analyzer.polarity_scores(sample.response)[self._figure])
