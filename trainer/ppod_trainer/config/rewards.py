"""From scores to token rewards, and the KL penalty."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel


class LengthPenaltyConfig(ConfigModel):
    """Taken off the score for each token above a budget."""

    budget_tokens: int = Field(ge=0, description="longest response that costs nothing")
    per_token: float = Field(gt=0, description="what each token above it costs")


class OverlongConfig(ConfigModel):
    """Soft overlong punishment (DAPO, equation 13): from 0 at max_tokens - cache_tokens to `penalty` at max_tokens."""

    max_tokens: int = Field(ge=1, description="such as rollout.max_tokens")
    cache_tokens: int = Field(ge=1, description="length of the slope")
    penalty: float = Field(default=1.0, gt=0, description="taken off at max_tokens and beyond")

    @model_validator(mode="after")
    def _slope_fits(self) -> Self:
        if self.cache_tokens > self.max_tokens:
            raise ValueError(f"cache_tokens is {self.cache_tokens}, more than max_tokens, {self.max_tokens}")
        return self


class SafetyFilterConfig(ConfigModel):
    """Samples that a safety reward scores low are not trained on."""

    reward: str = Field(min_length=1, description="a part of the reward that is asked, such as a term of its sum")
    at_least: float = Field(description="lowest score of that part that is trained on")


class FiltersConfig(ConfigModel):
    """What is never trained on, whatever its score. Rejected samples are counted and logged."""

    min_tokens: int | None = Field(default=None, ge=1, description="shorter responses; none: any length")
    max_repetition: float | None = Field(
        default=None, ge=0, lt=1, description="responses of which a larger share of n-grams stood in them before"
    )
    repetition_ngram: int = Field(default=4, ge=1, description="tokens of such an n-gram")
    safety: SafetyFilterConfig | None = None


class RewardsConfig(ConfigModel):
    """From the reward model's score to token rewards: normalised, then clipped, then penalties taken off."""

    model: bool = Field(
        default=True, description="pay the reward model's score; false: the environment's rewards alone"
    )
    normalize: Literal["none", "scale", "whiten"] = Field(
        default="none",
        description="by the statistics of all scores of the run so far. scale: divide by their standard deviation; "
        "whiten: take their mean off first",
    )
    clip: float | None = Field(default=None, gt=0, description="bounds the score to [-clip, clip]")
    shaping: Literal["none", "token", "step"] = Field(
        default="none",
        description="pay the score as it arises, by the reward model's scores of the response so far: after each token "
        "or step, and in sum the same but for the prompt's own score; see potentials.py",
    )
    shaping_interval: int = Field(
        default=1, ge=1, description="by token: how many from one score to the next; fewer scores cost less"
    )
    stop_token: Literal["auto", "read", "hide"] = Field(
        default="auto",
        description="whether rewards get the stop token that ended a response, too. auto: where the prompts are "
        "conversations, whose reward models learned from whole turns, the token with which the chat template ends one; "
        "read: any, for models that learned from texts with an end of sequence; hide: what the user sees alone. "
        "Heads drop both, functions and judges read text without special tokens: to them it is the same",
    )
    missing_eos_penalty: float = Field(default=0.0, ge=0, description="taken off the score of a response cut off")
    length_penalty: LengthPenaltyConfig | None = Field(default=None, description="none: length costs nothing")
    overlong: OverlongConfig | None = Field(default=None, description="none: as long as it may be costs nothing")
    mask_truncated: bool = Field(default=False, description="leave responses that were cut off out of the loss")
    filters: FiltersConfig = FiltersConfig()

    @model_validator(mode="after")
    def _interval_is_read(self) -> Self:
        if self.shaping_interval != 1 and self.shaping != "token":
            raise ValueError(
                f"shaping_interval is {self.shaping_interval}, and shaping {self.shaping} counts no tokens: set "
                "shaping to token, or leave the interval out"
            )
        return self

    @model_validator(mode="after")
    def _scores_are_there(self) -> Self:
        read = self.normalize != "none" or self.filters.safety is not None or self.shaping != "none"
        if not self.model and (read or self.clip is not None):
            raise ValueError(
                "normalize, clip, shaping and filters.safety read the reward model's scores, which model false leaves "
                "out"
            )
        return self


class AdaptiveKlConfig(ConfigModel):
    """Proportional controller of Ziegler et al. 2019, section 2.2."""

    target: float = Field(default=6.0, gt=0, description="KL to the reference to steer to, nats a response")
    horizon: int = Field(default=10_000, ge=1, description="samples over which the coefficient adapts")


class KlConfig(ConfigModel):
    """KL penalty to the reference."""

    coefficient: float = Field(default=0.05, ge=0, description="starting, or fixed, coefficient")
    placement: Literal["reward", "loss"] = Field(
        default="reward", description="reward: taken off each token's reward; loss: a term of the loss"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1",
        description="by d = log policy - log reference of a token: k1: d, k2: d^2 / 2, k3: exp(-d) - 1 + d",
    )
    importance_weighted: bool = Field(
        default=False,
        description="in the loss: weigh the estimate with policy / old policy, so that its gradient is KL's for every "
        "estimator, in later minibatches, too",
    )
    adaptive: AdaptiveKlConfig | None = None

    @model_validator(mode="after")
    def _refuse_k1_loss(self) -> Self:
        if self.placement == "loss" and self.estimator == "k1" and not self.importance_weighted:
            raise ValueError(
                "estimator k1 in the loss has a gradient of mean zero; use k2 (KL's gradient) or k3, or set "
                "importance_weighted"
            )
        if self.placement == "reward" and self.importance_weighted:
            raise ValueError("importance_weighted is for a penalty in the loss; placement is 'reward'")
        return self

    @model_validator(mode="after")
    def _adapts_from_something(self) -> Self:
        if self.adaptive is not None and not self.coefficient:
            raise ValueError(
                "adaptive multiplies the coefficient, and coefficient is 0, which stays 0; set what it starts from, "
                "such as 0.05, or leave adaptive out"
            )
        return self
