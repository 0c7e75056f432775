"""Configuration of the reward service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from pydantic import Field, field_validator

from ppod_services.core.config import ServiceConfig
from ppod_services.reward.composition_rules import composition_faults, members_of
from ppod_services.reward.kinds import PretrainedReward, RewardConfig


class RewardServiceConfig(ServiceConfig):
    """Which rewards to serve; heads with the same trunk, device and dtype share it in memory."""

    rewards: tuple[RewardConfig, ...] = Field(
        min_length=1,
        description="named rewards, each of one kind (`head` where none is given); the first is the default",
    )
    tokenizers: tuple[str, ...] = Field(
        default=(),
        description="further tokenizers (packaged:NAME, a directory or a hub id) that token ids may come from, such as "
        "the policy's where every reward model has another",
    )
    max_process_positions: int = Field(
        default=65_536,
        ge=1,
        description="most scored positions of a request; each costs a forward over its prefix, except where the "
        "model scores all positions at once",
    )

    @property
    def takes_tokens(self) -> bool:
        """Whether there is any tokenizer, of a model or by itself."""
        return bool(self.tokenizers) or any(isinstance(one, PretrainedReward) for one in self.rewards)

    def parts_of(self, name: str) -> list[str]:
        """A reward of this service and all that its score is made of."""
        members = {one.name: members_of(one) for one in self.rewards}
        parts = [name]
        for one in parts:
            parts += [member for member in members[one] if member not in parts]
        return parts

    @field_validator("rewards")
    @classmethod
    def _fit_together(cls, rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        faults = composition_faults(rewards)
        models = [one.model for one in rewards if isinstance(one, PretrainedReward)]
        threads = sorted({model.threads for model in models if model.threads is not None})
        if len(threads) > 1:
            counts = " and ".join(map(str, threads))
            faults.append(f"model.threads are {counts}: they are of the process, and the same for all its models")
        if faults:
            raise ValueError("; ".join(faults))
        return rewards
