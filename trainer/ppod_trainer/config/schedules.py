"""What changes over the steps of a run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel
from ppod_trainer.config.rollouts import LEAST_TEMPERATURE


class LinearSchedule(ConfigModel):
    """From the value that is configured at its own place, at the first step, to `end`, and constant from there on."""

    end: float = Field(ge=0, description="the last value")
    steps: int | None = Field(default=None, ge=1, description="after so many steps it is `end`; none: the run's last")


class SchedulesConfig(ConfigModel):
    """Values that change over the steps. Each starts at what is configured at its own place."""

    temperature: LinearSchedule | None = Field(
        default=None,
        description="rollout.temperature, of sampler, policy and reference alike; evaluations keep the first; "
        "none: constant",
    )
    entropy_coefficient: LinearSchedule | None = Field(default=None, description="ppo's; none: constant")
    kl_coefficient: LinearSchedule | None = Field(default=None, description="kl.coefficient; none: constant")

    @model_validator(mode="after")
    def _stay_above_zero(self) -> Self:
        if self.temperature is not None and self.temperature.end < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature.end is {self.temperature.end:g}: it must be at least {LEAST_TEMPERATURE:g}, logits are "
                "divided by it"
            )
        return self
