"""The card of a reward head: what it reads, what it was made on, how, and what it does on held-out reviews.

Plain schemas without a tensor library, so that a configuration or a launcher may read them at no cost.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppod_models.configuration import ConfigModel

Pooling = Literal["end", "last", "mean"]


class Read(ConfigModel):
    """One pooled hidden state."""

    layer: int = Field(ge=1, description="decoder layer whose output is read, counted from 1, before the final norm")
    pooling: Pooling = Field(
        description="end: the state of the very last token, after the suffix; last: of the sequence's own last token; "
        "mean: the mean over the sequence's own tokens"
    )


class FeatureSpec(ConfigModel):
    """What a head reads from its trunk."""

    prefix: str = Field(default="", description="text put before each sequence")
    suffix: str = Field(default="", description="text put after each sequence")
    reads: tuple[Read, ...] = Field(min_length=1, description="pooled states, concatenated in this order")


class TrunkSpec(ConfigModel):
    """The trunk that a head was made on."""

    source: str = Field(description="where the trunk came from when the head was trained")
    fingerprint: str = Field(description="fingerprint of the model's files, as `sources.resolve` computes it")
    weights_digest: str = Field(description="digest of the weights themselves, the same in float32 and in bfloat16")
    tokenizer_fingerprint: str
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)


class TrainingRecord(ConfigModel):
    """How a head came about."""

    command: str
    data_sha256: str = Field(description="first 16 hex digits of the SHA-256 of the ratings file")
    split_seed: int
    half: Literal["a", "b"]
    loss: str
    l2: float = Field(description="the penalty that validation inside the half picked")
    reviews_fitted: int
    dtype: str = Field(description="of the trunk while the head was trained and evaluated")


class HeldOutFigures(ConfigModel):
    """What the head does on the held-out reviews."""

    reviews: int
    pairs: int
    accuracy: float = Field(description="share of all pairs with different ratings ordered as people do")
    clear_pairs: int = Field(description="pairs whose mean ratings differ by more than 1")
    clear_accuracy: float
    calibration_error: float = Field(description="expected calibration error of P(a is preferred over b)")


class HeadCard(ConfigModel):
    """The card beside a head's weights."""

    name: str
    features: FeatureSpec
    trunk: TrunkSpec
    logit_per_score: float = Field(
        gt=0, description="P(a preferred over b) = sigmoid(logit_per_score * (score_a - score_b))"
    )
    training: TrainingRecord
    held_out: HeldOutFigures
