"""How advantages come from rewards and values."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel


class AdvantagesConfig(ConfigModel):
    """How advantages come from rewards and values."""

    kind: Literal["gae", "monte_carlo", "one_step", "sequence"] = Field(
        default="gae",
        description="monte_carlo: discounted return - V; one_step: r + gamma V(next) - V; "
        "sequence: A = R - V(s), the same for all tokens",
    )
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE")
    value_lam: float | None = Field(
        default=None, ge=0, le=1, description="lambda of GAE's value targets, such as 1; none: that of the advantages"
    )
    lam_length_alpha: float | None = Field(
        default=None,
        gt=0,
        description="GAE's lambda by length, in place of lam: 1 - 1 / (this * action tokens), such as 0.05 (VAPO); "
        "none: off",
    )
    whiten: bool = Field(default=True, description="mean 0 and variance 1 over the batch's response tokens")
    bootstrap_truncated: bool = Field(
        default=False, description="a response cut off continues with V(next state); its score is still paid"
    )

    @model_validator(mode="after")
    def _lambdas_are_read(self) -> Self:
        for key in ("value_lam", "lam_length_alpha"):
            if self.kind != "gae" and getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to GAE; kind {self.kind!r} does not read it: leave it out")
        return self
