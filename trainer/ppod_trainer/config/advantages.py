"""How advantages come from rewards and values."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppod_models.configuration import ConfigModel


class AdvantagesConfig(ConfigModel):
    """How advantages come from rewards and values."""

    kind: Literal["gae", "sequence"] = Field(
        default="gae", description="sequence: A = R - V(s), the same for all tokens"
    )
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE")
    whiten: bool = Field(default=True, description="mean 0 and variance 1 over the batch's response tokens")
    bootstrap_truncated: bool = Field(
        default=False, description="a response cut off continues with V(next state); its score is still paid"
    )
