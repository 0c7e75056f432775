"""Episodes: the policy and an environment by turns, until one of them ends it.

All episodes take a turn together, or each goes on by itself; generation batches what is asked at the same time. Their
environments answer at the same time, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ppod.tensors import TokenArray
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.environments import Environment
from ppod_trainer.environments.calls import EnvironmentCalls
from ppod_trainer.errors import WithheldError
from ppod_trainer.prompts import Encode, Prompt
from ppod_trainer.rollouts import Rollout, Turn, sample_seed
from ppod_trainer.sampling import Context, TurnSampler
from ppod_trainer.threads import at_once

_MOST_BY_THEMSELVES = 512
"""Most episodes under way where each goes on by itself: each has a thread and a call of generation, whose service by
default takes 4,096 calls of all its callers together."""


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """How episodes go on, and when one is cut off.

    Attributes:
        max_turns: most turns of the policy.
        max_context_tokens: a turn begins only below so many tokens of prompt, turns and observations.
        independent: each asks for its next turn as soon as its environment has answered; else all take turns together.
    """

    max_turns: int
    max_context_tokens: int
    independent: bool = False


@dataclass(frozen=True, slots=True)
class TextCodec:
    """Text to token ids, without special tokens, and back, special tokens left out."""

    encode: Encode
    decode: Callable[[TokenArray], str]


@dataclass(slots=True, eq=False)
class _Episode:
    """An episode under way: its turns with their rewards, and the observations between them.

    `done` says that the environment ended it, `ended` that no turn follows, for whatever reason.
    """

    prompt: Prompt
    seed: int
    environment: Environment
    turns: list[Turn] = field(default_factory=list[Turn])
    rewards: list[float] = field(default_factory=list[float])
    observations: list[TokenArray] = field(default_factory=list[TokenArray])
    done: bool = False
    ended: bool = False

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
            hides_stop_token=self.turns[-1].hides_stop_token,
            seed=self.seed,
            temperature=self.turns[0].temperature,
        )


_Begin = Callable[[], _Episode]
_Ask = Callable[[Sequence[_Episode]], list[Turn | WithheldError]]


class EpisodeSampler:
    """A `Sampler` for prompts that begin an episode; a prompt's index is the seed of its episode.

    Args:
        turns: samples the policy's turns.
        environments: makes and asks an environment for each episode.
        codec: of the policy's tokenizer.
        rules: how episodes go on, and when one is cut off.
        bad_samples: what becomes of an episode whose turn a service refuses.
    """

    def __init__(
        self,
        turns: TurnSampler,
        environments: EnvironmentCalls,
        codec: TextCodec,
        rules: EpisodeRules,
        bad_samples: BadSamples,
    ) -> None:
        self._turns = turns
        self._environments = environments
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
        """Play an episode from each prompt; in the order of the prompts."""

        def ask(asked: Sequence[_Episode]) -> list[Turn | WithheldError]:
            return self._turns.sample([episode.context() for episode in asked], policy_version, temperature)

        begin = [partial(self._begin, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        play = self._play_independently if self._rules.independent else self._play_together
        # Those that were dropped have not ended.
        return [episode.rollout() for episode in play(begin, ask) if episode.ended]

    def _play_together(self, begin: Sequence[_Begin], ask: _Ask) -> list[_Episode]:
        """Generation is asked for one turn of all, so that one seed gives the same batches, then all environments."""
        episodes = active = at_once(begin, self._environments.threads)
        while active:
            asked, turns = self._bad_samples.call(active, ask)
            at_once(
                [partial(self._take, episode, turn) for episode, turn in zip(asked, turns, strict=True)],
                self._environments.threads,
            )
            active = [episode for episode in asked if not episode.ended]
        return episodes

    def _play_independently(self, begin: Sequence[_Begin], ask: _Ask) -> list[_Episode]:
        """A thread for each episode: none waits for the turn of another."""
        stopped = threading.Event()

        def play(begin_it: _Begin) -> _Episode:
            episode = begin_it()
            while not episode.ended and not stopped.is_set():
                kept, turns = self._bad_samples.call([episode], ask)
                if not kept or stopped.is_set():
                    break
                self._take(episode, turns[0])
            return episode

        try:
            return at_once([partial(play, begin_it) for begin_it in begin], _MOST_BY_THEMSELVES)
        finally:
            # Where one failed, or the run is told to stop, the others ask for nothing more.
            stopped.set()

    def _begin(self, prompt: Prompt, seed: int) -> _Episode:
        environment, _ = self._environments.begin(prompt.index)
        return _Episode(prompt, seed, environment)

    def _take(self, episode: _Episode, turn: Turn) -> None:
        """Take a turn, ask the environment, and note whether another turn follows."""
        which = f"turn {len(episode.turns)} of the episode of seed {episode.prompt.index}"
        reply = self._environments.step(episode.environment, self._codec.decode(turn.tokens), which)
        episode.turns.append(turn)
        episode.rewards.append(reply.reward)
        episode.done = reply.done
        episode.ended = reply.done or turn.truncated or len(episode.turns) == self._rules.max_turns
        if not episode.ended:
            episode.observations.append(np.asarray(self._codec.encode(reply.observation), dtype=np.int32))
            episode.ended = len(episode.context().tokens) >= self._rules.max_context_tokens
