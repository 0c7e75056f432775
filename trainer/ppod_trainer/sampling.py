"""Asking generation for what the policy says: turns, and responses of one turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ppod import GenerationClient, Sampling
from ppod.client import Completion, FinishReason
from ppod.tensors import FloatArray, TokenArray
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.config import RolloutConfig
from ppod_trainer.errors import WithheldError
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, Turn, VersionArray


class Sampler(Protocol):
    """Makes one rollout for each prompt."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        policy_version: int | None,
        temperature: float | None = None,
    ) -> list[Rollout]:
        """Sample with the weights of exactly this version, or with None of whichever serve.

        The temperature is the configured one where none is given; each rollout carries it.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What the policy continues: int32 [length] and the seed of the continuation."""

    tokens: TokenArray
    seed: int


class TurnSampler:
    """Samples one continuation of each context.

    What is handed back unfinished, because new weights came, is asked for again until it is finished: it goes on with
    the new weights, and its versions tell which token is whose.
    """

    def __init__(self, client: GenerationClient, config: RolloutConfig, stop: tuple[str, ...] = ()) -> None:
        self._client = client
        self._sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature, stop=stop)

    def sample(
        self, contexts: Sequence[Context], policy_version: int | None, temperature: float | None = None
    ) -> list[Turn]:
        """Raises PpodError: generation failed, serves another version, or withholds a completion."""
        sampling = self._sampling if temperature is None else replace(self._sampling, temperature=temperature)
        begun = [_Begun() for _ in contexts]
        left = list(range(len(contexts)))
        while left:
            completions = self._client.generate(
                [np.concatenate([contexts[index].tokens, *begun[index].tokens]) for index in left],
                sampling,
                seeds=[contexts[index].seed for index in left],
                weight_version=policy_version,
                resumed_tokens=[begun[index].length for index in left],
            )
            for index, completion in zip(left, completions, strict=True):
                if completion.finish_reason is FinishReason.FILTERED:
                    raise WithheldError(completion.filter_reason, index)
                begun[index].add(completion)
            left = [index for index in left if begun[index].ending is FinishReason.ABORTED]
        return [one.turn(sampling.temperature) for one in begun]


@dataclass(slots=True, eq=False)
class _Begun:
    """The parts of a turn so far."""

    tokens: list[TokenArray] = field(default_factory=list[TokenArray])
    logprobs: list[FloatArray] = field(default_factory=list[FloatArray])
    versions: list[VersionArray] = field(default_factory=list[VersionArray])
    ending: FinishReason = FinishReason.ABORTED

    @property
    def length(self) -> int:
        """Tokens so far."""
        return sum(len(part) for part in self.tokens)

    def add(self, completion: Completion) -> None:
        """Take the next part."""
        self.tokens.append(completion.token_ids)
        self.logprobs.append(completion.logprobs)
        self.versions += [np.full(span.tokens, span.weight_version) for span in completion.weight_spans]
        self.ending = completion.finish_reason

    def turn(self, temperature: float) -> Turn:
        """All parts together."""
        return Turn(
            tokens=np.concatenate(self.tokens),
            logprobs=np.concatenate(self.logprobs),
            versions=np.concatenate(self.versions),
            truncated=self.ending is FinishReason.LENGTH,
            stop_token=self.ending is FinishReason.STOP,
            temperature=temperature,
        )


class ResponseSampler:
    """A `Sampler` for prompts that are answered in one turn."""

    def __init__(self, turns: TurnSampler, bad_samples: BadSamples) -> None:
        self._turns = turns
        self._bad_samples = bad_samples

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        policy_version: int | None,
        temperature: float | None = None,
    ) -> list[Rollout]:
        """See `Sampler`."""

        def turns(kept: Sequence[tuple[Prompt, int]]) -> list[Turn]:
            contexts = [Context(prompt.token_ids, seed) for prompt, seed in kept]
            return self._turns.sample(contexts, policy_version, temperature)

        kept, found = self._bad_samples.call(list(zip(prompts, seeds, strict=True)), turns)
        return [Rollout.of_turn(prompt, turn, seed) for (prompt, seed), turn in zip(kept, found, strict=True)]
