"""Asking generation for what the policy says: turns, and responses of one turn."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from ppod import FilterFailed, GenerationClient, NonFiniteOutput, PpodError, Sampling, SplitPolicy
from ppod.client import Completion, FinishReason
from ppod.tensors import FloatArray, TokenArray
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.config import RolloutConfig
from ppod_trainer.errors import WithheldError
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, Turn, VersionArray

_MOST_BYTES = SplitPolicy().max_part_bytes
_SEQUENCE_BYTES = 32
"""What a sequence takes of a request beside its tokens: length, seed and the number of resumed tokens, at most."""


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
    """Samples one continuation of each context, by all of the client's replicas, as many as there are at each call.

    What is handed back unfinished, because new weights came, is asked for again until it is finished: it goes on with
    the new weights, and its versions tell which token is whose.

    Args:
        client: of generation.
        config: how tokens are drawn.
        stop: texts that end a turn besides the configuration's.
        most_sequences: generation's limit for one request; None: it is not known.
        read_stop_tokens: those that rewards read where a response ends in one.
    """

    def __init__(
        self,
        client: GenerationClient,
        config: RolloutConfig,
        stop: tuple[str, ...] = (),
        most_sequences: int | None = None,
        read_stop_tokens: Container[int] = (),
    ) -> None:
        self._client = client
        self._read_stop_tokens = read_stop_tokens
        self._most_sequences = most_sequences
        self._sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            stop=(*config.stop, *stop),
            stop_token_ids=config.stop_token_ids,
        )

    def sample(
        self, contexts: Sequence[Context], policy_version: int | None, temperature: float | None = None
    ) -> list[Turn | WithheldError]:
        """A turn for each context, or the error that generation's output filter withholds it.

        Raises:
            PpodError: generation failed, or serves another version.
        """
        sampling = self._sampling if temperature is None else replace(self._sampling, temperature=temperature)
        begun = [_Begun() for _ in contexts]
        withheld: dict[int, WithheldError] = {}
        left = list(range(len(contexts)))
        while left:
            shares = equal_parts(contexts, left, self._client.replica_count)
            # A replica that left makes the others' shares larger, and so does each turn of a conversation.
            parts = [part for share in shares for part in self._within_limits(contexts, begun, share)]
            asked = [partial(self._ask, contexts, begun, part, policy_version, sampling) for part in parts]
            completions = [each for part in _together(asked) for each in part]
            for index, completion in zip(left, completions, strict=True):
                if completion.finish_reason is FinishReason.FILTERED:
                    # Nothing is raised: the others would be lost with it, and sampled again.
                    withheld[index] = WithheldError(completion.filter_reason, index)
                else:
                    begun[index].add(completion)
            left = [index for index in left if index not in withheld and begun[index].ending is FinishReason.ABORTED]
        return [
            withheld.get(index) or one.turn(sampling.temperature, self._read_stop_tokens)
            for index, one in enumerate(begun)
        ]

    def _within_limits(
        self, contexts: Sequence[Context], begun: Sequence[_Begun], share: Sequence[int]
    ) -> list[Sequence[int]]:
        """A share in parts of which each is one request; equal neighbours stay together."""
        tokens = [contexts[index].tokens for index in share]
        # As `_ask` asks for them. Of a part they are as many, or it asks for them one by one.
        copies = 1 if any(begun[index].length for index in share) else equal_runs(tokens)
        sizes = [
            _SEQUENCE_BYTES + 4 * (len(own) + begun[index].length) / copies
            for index, own in zip(share, tokens, strict=True)
        ]
        ends = list(accumulate(sizes, initial=0.0))
        cuts = [0]
        for start, end in pairwise([*run_starts(tokens), len(share)]):
            many = self._most_sequences is not None and end - cuts[-1] > self._most_sequences
            if start > cuts[-1] and (many or ends[end] - ends[cuts[-1]] > _MOST_BYTES):
                cuts.append(start)
        return [share[start:end] for start, end in pairwise([*cuts, len(share)])]

    def _ask(
        self,
        contexts: Sequence[Context],
        begun: Sequence[_Begun],
        left: Sequence[int],
        policy_version: int | None,
        sampling: Sampling,
    ) -> list[Completion]:
        """One completion of each context that is left, behind what is begun of it."""
        prompts = [np.concatenate([contexts[index].tokens, *begun[index].tokens]) for index in left]
        resumed = [begun[index].length for index in left]
        # Equal neighbours, such as a group's, go as one prompt, which is run once for all of them. The contract takes
        # no resumed tokens with several completions of a prompt.
        copies = 1 if any(resumed) else equal_runs(prompts)

        def ask() -> list[Completion]:
            return self._client.generate(
                prompts[::copies],
                replace(sampling, n=copies),
                seeds=[contexts[index].seed for index in left],
                weight_version=policy_version,
                resumed_tokens=resumed[::copies],
            )

        try:
            try:
                return ask()
            except (NonFiniteOutput, FilterFailed):
                if copies == 1:
                    raise
                # It is about one completion, and names the prompt of several: asked one by one, it shows which.
                copies = 1
                return ask()
        except PpodError as error:
            sample: int | None = getattr(error, "sample", None)
            if sample is not None:
                # Of the contexts that share the prompt take the first; those that stay will be refused, too.
                error.sample = left[sample * copies]  # pyright: ignore[reportAttributeAccessIssue]
            raise


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

    def turn(self, temperature: float, read_stop_tokens: Container[int]) -> Turn:
        """All parts together."""
        tokens = np.concatenate(self.tokens)
        return Turn(
            tokens=tokens,
            logprobs=np.concatenate(self.logprobs),
            versions=np.concatenate(self.versions),
            truncated=self.ending is FinishReason.LENGTH,
            hides_stop_token=self.ending is FinishReason.STOP and int(tokens[-1]) not in read_stop_tokens,
            temperature=temperature,
        )


def equal_parts(contexts: Sequence[Context], left: Sequence[int], count: int) -> list[Sequence[int]]:
    """The positions that are left in at most `count` parts of about equal size; equal neighbours stay together."""
    starts = run_starts([contexts[index].tokens for index in left])
    count = min(max(count, 1), len(starts))
    cuts = [starts[len(starts) * part // count] for part in range(count)] + [len(left)]
    return [left[begin:end] for begin, end in pairwise(cuts)]


def _together(asked: Sequence[Callable[[], list[Completion]]]) -> list[list[Completion]]:
    """Ask all at the same time; raises the first error in their order. One alone is asked on this thread."""
    if len(asked) == 1:
        return [asked[0]()]
    pool = ThreadPoolExecutor(len(asked), thread_name_prefix="generate")
    try:
        # With this thread's context, so that the calls belong to the step's trace.
        pending = [pool.submit(copy_context().run, each) for each in asked]
        return [each.result() for each in pending]
    finally:
        # Whoever is interrupted here does not wait for the others: closing the client ends them.
        pool.shutdown(wait=False, cancel_futures=True)


def run_starts(sequences: Sequence[TokenArray]) -> list[int]:
    """Where runs of equal neighbours begin."""
    return [
        index
        for index, sequence in enumerate(sequences)
        if index == 0 or not np.array_equal(sequence, sequences[index - 1])
    ]


def equal_runs(sequences: Sequence[TokenArray]) -> int:
    """Length of the runs of equal neighbours, where all have the same; else 1."""
    starts = run_starts(sequences)
    lengths = {end - start for start, end in zip(starts, [*starts[1:], len(sequences)], strict=True)}
    return lengths.pop() if len(lengths) == 1 else 1


@dataclass(frozen=True, slots=True)
class _Response:
    """A response that is asked for."""

    prompt: Prompt
    seed: int


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

        def turns(kept: Sequence[_Response]) -> list[Turn | WithheldError]:
            contexts = [Context(one.prompt.token_ids, one.seed) for one in kept]
            return self._turns.sample(contexts, policy_version, temperature)

        asked = [_Response(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        kept, found = self._bad_samples.call(asked, turns)
        return [Rollout.of_turn(one.prompt, turn, one.seed) for one, turn in zip(kept, found, strict=True)]
