"""Watching a run for trouble: what counts as trouble, and what it does to the run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel

TroubleKind = Literal[
    "reward_hacking",
    "length_growth",
    "repetition",
    "entropy_collapse",
    "kl_blow_up",
    "value_collapse",
    "dead_gradients",
    "all_equal_rewards",
    "sampler_gap",
]


class WatchConfig(ConfigModel):
    """Every trouble is logged, with what to try, and exported; those in `stop` end the run at a checkpoint."""

    stop: tuple[TroubleKind, ...] = Field(default=(), description="kinds of trouble that stop the run")
    ignore: tuple[TroubleKind, ...] = Field(default=(), description="kinds that are not looked for")
    steps: int = Field(default=3, ge=1, description="steps in a row that must show a trouble")
    baseline_steps: int = Field(default=5, ge=1, description="first steps, whose mean is what later ones are held to")
    length_ratio: float = Field(default=2.0, gt=1, description="length_growth: of the baseline's response length")
    ended_ratio: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="length_growth: of the baseline's share of responses that were not cut off, where most were not",
    )
    distinct_ratio: float = Field(default=0.5, gt=0, lt=1, description="repetition: of the baseline's distinct-2")
    entropy_ratio: float = Field(default=0.2, gt=0, lt=1, description="entropy_collapse: of the baseline's entropy")
    kl_per_token: float = Field(default=2.0, gt=0, description="kl_blow_up: KL to the reference, nats a token")
    update_kl: float = Field(default=1.0, gt=0, description="kl_blow_up: KL of one step's update, nats a token")
    explained_variance: float = Field(default=-1.0, lt=0, description="value_collapse: a value head worse than none")
    value_std: float = Field(default=1e-6, ge=0, description="value_collapse: values that are all the same")
    value_warmup_steps: int = Field(default=10, ge=0, description="value_collapse: steps before it is looked for")
    grad_norm: float = Field(default=1e-8, ge=0, description="dead_gradients: largest norm of a dead gradient")
    score_std: float = Field(default=1e-8, ge=0, description="all_equal_rewards: of the step's outcomes")
    sampler_gap: float = Field(
        default=0.1, gt=0, description="sampler_gap: mean |trainer - sampler| logprob of the same weights, nats a token"
    )
    judged_steps: int = Field(default=6, ge=2, description="reward_hacking: latest judged steps that are compared")
    judge_fall: float = Field(
        default=0.5, gt=0, description="reward_hacking: rise of the score and fall of the judge, standard deviations"
    )
    judge_parting: float = Field(
        default=1.0, gt=0, description="reward_hacking: rise of the score over that of the judge, standard deviations"
    )

    @model_validator(mode="after")
    def _looked_for(self) -> Self:
        both = sorted(set(self.stop) & set(self.ignore))
        if both:
            raise ValueError(f"{', '.join(both)}: in stop and in ignore; what is not looked for cannot stop the run")
        return self
