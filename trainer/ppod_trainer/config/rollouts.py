"""Prompts, sampling and environments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from ppod_models.configuration import ConfigModel

LEAST_TEMPERATURE = 1e-6
"""Logits are divided by it; services refuse less (reference.proto)."""

_REVIEW_TOKENS = 6
_PROMPT_FILES = (".tsv", ".jsonl", ".txt")


def _first_tokens(values: Mapping[str, object]) -> int | None:
    """Reviews are no prompts; prompts of one's own are whole."""
    return _REVIEW_TOKENS if values.get("path") is None else None


class PromptsConfig(ConfigModel):
    """Prompts: the first tokens of texts."""

    path: Path | None = Field(
        default=None,
        description=".tsv with a `text` column (tabs between columns; quotes are text), .txt with a prompt a line, or "
        ".jsonl with a `prompt` or with `messages`, each of `role` and `content`; none: movie reviews. A column or "
        "field `reference` is the answer that rewards such as exact_answer hold responses against. Texts are read as "
        "they stand: a token that a model expects before a prompt has to be in them; messages go through the policy's "
        "chat template, which begins the assistant's turn and whose today is always 26 July 2024",
    )
    first_tokens: int | None = Field(
        default_factory=_first_tokens,
        ge=1,
        description="tokens kept of each text; none: all, as of a path's by default",
    )
    heldout: int = Field(default=64, ge=1, description="prompts kept aside for evaluation")
    curriculum_steps: int = Field(
        default=0, ge=0, description="first steps with short prompts, to which each adds longer ones; 0: all at once"
    )

    @field_validator("path")
    @classmethod
    def _is_of_a_known_kind(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix not in _PROMPT_FILES:
            raise ValueError(f"unknown kind {path.suffix!r}, expected {', '.join(_PROMPT_FILES)}")
        return path


class DynamicSamplingConfig(ConfigModel):
    """Dynamic sampling (DAPO): groups whose outcomes are all equal are replaced by those of further prompts."""

    max_rounds: int = Field(default=4, ge=2, le=100, description="most rounds of batch_size samples in a step")


class HistoryResamplingConfig(ConfigModel):
    """History resampling (SRPO): prompts that were solved in an epoch are left out of the next."""

    solved_outcome: float = Field(
        default=1.0, description="a prompt is solved if all its samples were paid this much or more"
    )


class RolloutConfig(ConfigModel):
    """How samples are drawn. top-p and top-k are refused in training: the old policy's support would differ."""

    batch_size: int = Field(default=32, ge=1, description="samples in a step")
    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        description="samples of each prompt, a group; a step has batch_size / samples_per_prompt prompts",
    )
    dynamic_sampling: DynamicSamplingConfig | None = Field(
        default=None, description="none: a step trains on all its samples"
    )
    history_resampling: HistoryResamplingConfig | None = Field(
        default=None, description="none: epochs have all prompts"
    )
    max_tokens: int = Field(default=24, ge=1, description="longest response")
    temperature: float = Field(
        default=1.0, ge=LEAST_TEMPERATURE, description="divides sampler, policy and reference logits alike"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        max_length=16,
        description="texts that end a response, or with an environment a turn besides its own; the token that "
        "completes one is the last, and what it completes is read by rewards; a special token that is named stands for "
        "itself, as in stop_token_ids",
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="tokens that end a response besides the model's own, such as the end of a turn in a base model's "
        "chat template; whether rewards read them is told by rewards.stop_token",
    )
    top_p: float = Field(default=1.0, description="must be 1 in training")
    top_k: int = Field(default=0, description="must be 0 in training")
    on_bad_sample: Literal["stop", "skip"] = Field(
        default="stop", description="what a typed error that names a sample does: stop the run, or drop the sample"
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="steps ahead that samples are begun, and most updates that their weights may be behind; "
        "0: each step waits for samples of its own weights",
    )

    @model_validator(mode="after")
    def _refuse_cut_support(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                "top_p must be 1 and top_k 0 in training: the sampler would draw from a smaller support than the "
                "trainer's and the reference's logprobs are computed on"
            )
        return self

    @model_validator(mode="after")
    def _refuse_broken_groups(self) -> Self:
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of samples_per_prompt, "
                f"{self.samples_per_prompt}, so that all groups are whole"
            )
        if self.dynamic_sampling is not None and self.samples_per_prompt < 2:
            raise ValueError(
                f"dynamic_sampling compares the samples of one prompt, and samples_per_prompt is "
                f"{self.samples_per_prompt}; set it to 2 or more, such as 8"
            )
        return self


class EnvironmentConfig(ConfigModel):
    """Conversations of several turns with an environment, whose questions take the place of `prompts.path`."""

    name: str = Field(min_length=1, description="entry point of the group ppod.environments, such as calculator")
    parameters: dict[str, JsonValue] = Field(default_factory=dict, description="of the environment")
    episodes: int = Field(default=2048, ge=2, description="episodes, of seeds from 0; prompts.heldout are held out")
    max_turns: int = Field(default=4, ge=1, description="turns of the policy; each has rollout.max_tokens at most")
    turns: Literal["together", "independent"] = Field(
        default="together",
        description="together: all take a turn before any takes its next, and one seed gives one result; independent: "
        "none waits for another's turn, and what is sampled depends a little on who is there at the time",
    )
    threads: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="most environments that are asked at the same time; 1: for those that would disturb one another",
    )
