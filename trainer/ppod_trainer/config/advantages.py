"""How advantages come from rewards, values and groups of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel

AdvantageKind = Literal[
    "gae",
    "monte_carlo",
    "one_step",
    "sequence",
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "pvpo",
    "gigpo",
    "spa",
]

NEEDS_CRITIC: frozenset[AdvantageKind] = frozenset({"gae", "monte_carlo", "one_step", "sequence", "spa"})
"""These read values."""

NEEDS_GROUPS: frozenset[AdvantageKind] = frozenset({"grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gigpo"})
"""These compare the samples of one prompt."""

LEAVES_OUT_KL: frozenset[AdvantageKind] = frozenset({"grpo", "dr_grpo", "pvpo", "gigpo"})
"""These read what was paid for a response, not its token rewards, of which a KL penalty may be a part."""

READS_TOKEN_REWARDS: frozenset[AdvantageKind] = frozenset({"gae", "monte_carlo", "one_step", "reinforce_pp"})
"""These tell tokens apart by what was paid for each and behind it."""

_DISCOUNTED = READS_TOKEN_REWARDS | {"reinforce_pp_baseline", "spa"}
"""These discount what is paid later."""

_WHITENED = NEEDS_CRITIC | {"reinforce_pp", "reinforce_pp_baseline"}


def _whitened(values: Mapping[str, object]) -> bool:
    return values.get("kind", "gae") in _WHITENED


class GigpoConfig(ConfigModel):
    """Of kind gigpo."""

    weight: float = Field(default=1.0, ge=0, description="omega: of advantages among turns from the same state")
    gamma: float = Field(default=0.95, ge=0, le=1, description="discount a turn")
    scaled: bool = Field(default=True, description="divide by the deviation of the group")
    anchor: Literal["context", "observation"] = Field(
        default="context",
        description="what a state is: all that the policy has read, or what it read since its last turn",
    )


class SpaConfig(ConfigModel):
    """Of kind spa: the progress estimator."""

    hidden_units: int = Field(default=64, ge=1, description="of its one hidden layer")
    learning_rate: float = Field(default=1e-3, gt=0, description="its own")
    updates: int = Field(default=4, ge=1, description="optimizer steps on each step's episodes")


class AdvantagesConfig(ConfigModel):
    """How advantages come from rewards, values and groups of samples."""

    kind: AdvantageKind = Field(
        default="gae",
        description="gae; monte_carlo: discounted return - V; one_step: r + gamma V(next) - V; sequence: A = R - V(s), "
        "the same for all tokens; for the others see ppod_trainer/algorithms",
    )
    gamma: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="discount a token; of gae, monte_carlo, one_step, spa and the reinforce_pp kinds",
    )
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE, and of spa's")
    value_lam: float | None = Field(
        default=None, ge=0, le=1, description="lambda of GAE's value targets, such as 1; none: that of the advantages"
    )
    lam_length_alpha: float | None = Field(
        default=None,
        gt=0,
        description="GAE's lambda by length, in place of lam: 1 - 1 / (this * action tokens), such as 0.05 (VAPO); "
        "none: off",
    )
    whiten: bool = Field(
        default_factory=_whitened,
        description="mean 0 and variance 1 over the batch's response tokens; by default as the kind's paper does it: "
        "yes with a critic and for the reinforce_pp kinds",
    )
    bootstrap_truncated: bool = Field(
        default=False, description="a response cut off continues with V(next state); its score is still paid"
    )
    presamples: int = Field(
        default=4, ge=1, description="of kind pvpo: samples of each prompt that the initial policy makes beforehand"
    )
    gigpo: GigpoConfig = GigpoConfig()
    spa: SpaConfig = SpaConfig()

    @model_validator(mode="after")
    def _lambdas_are_read(self) -> Self:
        if self.kind not in ("gae", "spa") and self.lam != type(self).model_fields["lam"].default:
            raise ValueError(f"lam is {self.lam:g}, and kind {self.kind} has no lambda: leave it out")
        for key in ("value_lam", "lam_length_alpha"):
            if self.kind != "gae" and getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to GAE; kind {self.kind!r} does not read it: leave it out")
        return self

    @model_validator(mode="after")
    def _gamma_is_read(self) -> Self:
        if self.gamma != 1 and self.kind not in _DISCOUNTED:
            own = "set gigpo.gamma, and leave this out" if self.kind == "gigpo" else "leave it out"
            raise ValueError(f"gamma is {self.gamma:g}, and kind {self.kind} does not discount tokens: {own}")
        return self

    @model_validator(mode="after")
    def _bootstrap_has_values(self) -> Self:
        if self.bootstrap_truncated and self.kind not in NEEDS_CRITIC:
            raise ValueError(f"bootstrap_truncated is true, and kind {self.kind} has no values to go on with; use gae")
        return self
