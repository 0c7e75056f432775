"""Training on several devices."""

from __future__ import annotations

from pydantic import Field

from ppod_models.configuration import ConfigModel
from ppod_trainer.config.services import LONGEST_S


class RanksConfig(ConfigModel):
    """Ranks of the trainer: processes that share the model's weights and each step's samples, by FSDP2.

    torchrun and a JobSet say themselves how many there are; the results do not depend on it, but for rounding.
    """

    local: int = Field(default=1, ge=1, description="ranks that `ppod run` starts on this machine, each on its device")
    timeout_s: float = Field(
        default=600.0, gt=0, le=LONGEST_S, description="how long a rank waits for the others before all of them end"
    )
