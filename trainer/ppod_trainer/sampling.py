"""Asking generation for what the policy says: turns, and responses of one turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ppod import GenerationClient, Sampling
from ppod.client import Completion, FinishReason
from ppod.tensors import TokenArray
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.config import RolloutConfig
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, Turn


class Sampler(Protocol):
    """Makes one rollout for each prompt."""

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], policy_version: int | None) -> list[Rollout]:
        """Sample with the weights of exactly this version, or with None of whichever serve."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What the policy continues: int32 [length] and the seed of the continuation."""

    tokens: TokenArray
    seed: int


class TurnSampler:
    """Samples one continuation of each context."""

    def __init__(self, client: GenerationClient, config: RolloutConfig, stop: tuple[str, ...] = ()) -> None:
        self._client = client
        self._sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature, stop=stop)

    def sample(self, contexts: Sequence[Context], policy_version: int | None) -> list[Turn]:
        """Raises PpodError: generation failed, or serves another version."""
        completions = self._client.generate(
            [context.tokens for context in contexts],
            self._sampling,
            seeds=[context.seed for context in contexts],
            weight_version=policy_version,
        )
        return [_read_turn(completion) for completion in completions]


class ResponseSampler:
    """A `Sampler` for prompts that are answered in one turn."""

    def __init__(self, turns: TurnSampler, bad_samples: BadSamples) -> None:
        self._turns = turns
        self._bad_samples = bad_samples

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], policy_version: int | None) -> list[Rollout]:
        """See `Sampler`."""

        def turns(kept: Sequence[tuple[Prompt, int]]) -> list[Turn]:
            return self._turns.sample([Context(prompt.token_ids, seed) for prompt, seed in kept], policy_version)

        kept, found = self._bad_samples.call(list(zip(prompts, seeds, strict=True)), turns)
        return [Rollout.of_turn(prompt, turn, seed) for (prompt, seed), turn in zip(kept, found, strict=True)]


def _read_turn(completion: Completion) -> Turn:
    return Turn(
        tokens=completion.token_ids,
        logprobs=completion.logprobs,
        versions=np.full(len(completion.token_ids), completion.state.weight_version, dtype=np.int64),
        truncated=completion.finish_reason is FinishReason.LENGTH,
        stop_token=completion.finish_reason is FinishReason.STOP,
    )
