"""Configuration of reward training. No torch here: a launcher may read it without loading a tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ppod_models.configuration import ConfigModel, ModelConfig
from ppod_models.reward_cards import FeatureSpec


class DataConfig(ConfigModel):
    """Which reviews train, and which evaluate."""

    ratings: Path | None = Field(
        default=None,
        description="a .tsv with the columns id, mean_rating, stddev and text; none: the reviews that ppod ships",
    )
    split_seed: int = Field(default=1, description="the same for every head that shares the held-out reviews")
    half: Literal["a", "b"] = Field(description="the half that trains this head; a judge takes the other half")
    held_out_share: float = Field(default=1 / 9, gt=0, lt=1, description="of all reviews; trains no half")
    validation_share: float = Field(default=1 / 6, gt=0, lt=1, description="of the half; picks the penalty")


class FitConfig(ConfigModel):
    """The Bradley-Terry fit."""

    l2: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(0.03, 0.1, 0.3), min_length=1, description="penalties to choose from, per standardised feature"
    )
    max_iterations: int = Field(default=30, ge=1, description="of L-BFGS; few iterations regularise too")
    batch_reviews: int = Field(default=64, ge=1, description="reviews in one forward of the trunk")


class RewardTrainingConfig(ConfigModel):
    """Everything that decides a head: same configuration, same machine, same bytes."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="name of the head")
    model: ModelConfig
    data: DataConfig
    features: FeatureSpec
    fit: FitConfig = FitConfig()
    output: Path = Field(description="directory for the head, its card, figures and plots")
