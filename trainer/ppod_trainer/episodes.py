"""Episodes: the policy and an environment by turns, until one of them ends it.

All episodes take a turn together: generation batches what is asked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ppod.tensors import TokenArray
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.environments import Environment
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.prompts import Encode, Prompt
from ppod_trainer.rollouts import Rollout, Turn, sample_seed
from ppod_trainer.sampling import Context, TurnSampler


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """When an episode is cut off.

    Attributes:
        max_turns: most turns of the policy.
        max_context_tokens: a turn begins only below so many tokens of prompt, turns and observations.
    """

    max_turns: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class TextCodec:
    """Text to token ids, without special tokens, and back, special tokens left out."""

    encode: Encode
    decode: Callable[[TokenArray], str]


@dataclass(slots=True, eq=False)
class _Episode:
    """An episode under way: its turns with their rewards, and the observations between them."""

    prompt: Prompt
    seed: int
    environment: Environment
    turns: list[Turn] = field(default_factory=list[Turn])
    rewards: list[float] = field(default_factory=list[float])
    observations: list[TokenArray] = field(default_factory=list[TokenArray])
    done: bool = False

    def context(self) -> Context:
        """What the policy continues."""
        parts = [self.prompt.token_ids]
        for turn, observation in zip(self.turns, self.observations, strict=True):
            parts += [turn.tokens, observation]
        number = len(self.turns)
        # The first turn has the episode's own seed, as a response of one turn has.
        seed = sample_seed(self.seed, "turn", number, 0) if number else self.seed
        return Context(np.concatenate(parts), seed)

    def rollout(self) -> Rollout:
        """All of it as one response; observation tokens are no actions."""
        tokens, actions, logprobs, versions, numbers, rewards = [], [], [], [], [], []
        for number, turn in enumerate(self.turns):
            length = len(turn.tokens)
            observed = self.observations[number] if number < len(self.turns) - 1 else turn.tokens[:0]
            gap = np.zeros(len(observed))
            tokens += [turn.tokens, observed]
            actions += [np.ones(length), gap]
            logprobs += [turn.logprobs, gap]
            versions += [turn.versions, gap]
            numbers += [np.full(length, number), gap - 1]
            rewards += [np.zeros(length - 1), [self.rewards[number]], gap]
        return Rollout(
            prompt=self.prompt,
            response=np.concatenate(tokens).astype(np.int32),
            action_mask=np.concatenate(actions).astype(np.bool_),
            sampler_logprobs=np.concatenate(logprobs).astype(np.float32),
            versions=np.concatenate(versions).astype(np.int64),
            turns=np.concatenate(numbers).astype(np.int64),
            rewards=np.concatenate(rewards).astype(np.float32),
            truncated=not self.done,
            stop_token=self.turns[-1].stop_token,
            seed=self.seed,
            temperature=self.turns[0].temperature,
        )


class EpisodeSampler:
    """A `Sampler` for prompts that begin an episode; a prompt's index is the seed of its episode.

    Args:
        turns: samples the policy's turns.
        environment: makes an environment for each episode.
        codec: of the policy's tokenizer.
        rules: when an episode is cut off.
        bad_samples: what becomes of an episode whose turn a service refuses.
    """

    def __init__(
        self,
        turns: TurnSampler,
        environment: LoadedEnvironment,
        codec: TextCodec,
        rules: EpisodeRules,
        bad_samples: BadSamples,
    ) -> None:
        self._turns = turns
        self._environment = environment
        self._codec = codec
        self._rules = rules
        self._bad_samples = bad_samples

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        policy_version: int | None,
        temperature: float | None = None,
    ) -> list[Rollout]:
        """Play an episode from each prompt."""

        def turns(asked: Sequence[_Episode]) -> list[Turn]:
            return self._turns.sample([episode.context() for episode in asked], policy_version, temperature)

        active = [self._begin(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        finished: dict[int, _Episode] = {}
        order = {episode.seed: number for number, episode in enumerate(active)}
        while active:
            asked, found = self._bad_samples.call(active, turns)
            active = []
            for episode, turn in zip(asked, found, strict=True):
                if self._goes_on(episode, turn):
                    active.append(episode)
                else:
                    finished[order[episode.seed]] = episode
        return [finished[number].rollout() for number in sorted(finished)]

    def _begin(self, prompt: Prompt, seed: int) -> _Episode:
        environment = self._environment.make()
        environment.reset(prompt.index)
        return _Episode(prompt, seed, environment)

    def _goes_on(self, episode: _Episode, turn: Turn) -> bool:
        """Take a turn, ask the environment, and tell whether another turn follows."""
        reply = episode.environment.step(self._codec.decode(turn.tokens))
        episode.turns.append(turn)
        episode.rewards.append(reply.reward)
        episode.done = reply.done
        if reply.done or turn.truncated or len(episode.turns) == self._rules.max_turns:
            return False
        episode.observations.append(np.asarray(self._codec.encode(reply.observation), dtype=np.int32))
        return len(episode.context().tokens) < self._rules.max_context_tokens
