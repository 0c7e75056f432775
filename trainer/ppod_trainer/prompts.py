"""Prompts: where they come from, which are held out, and in which order they are used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ppod.client import ChatTurn
from ppod.tensors import TokenArray
from ppod_trainer.config import PromptsConfig
from ppod_trainer.errors import PromptError
from ppod_trainer.prompt_files import PromptText, Render, read_prompts

_HELDOUT_SEED = 20161  # Fixed, so that runs with different seeds are judged on the same prompts.

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        index: its position in the set, for messages.
        token_ids: int32 [length].
        reference: what rewards that check an answer hold responses against; None where there is nothing.
        turns: what the chat template was applied to; empty where it is no conversation.
    """

    index: int
    token_ids: TokenArray
    reference: str | None = None
    turns: tuple[ChatTurn, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Training and held-out prompts; no token sequence is in both, unless too many episodes begin alike.

    Attributes:
        training, heldout: the prompts.
        curriculum_steps: first steps, whose prompts are the shorter ones; 0: none.
        conversations: some went through the chat template.
    """

    training: list[Prompt]
    heldout: list[Prompt]
    curriculum_steps: int = 0
    conversations: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of all of them, with their answers and their places."""
        digest = hashlib.sha256()
        for one in [*self.training, *self.heldout]:
            digest.update(f"{one.index} {len(one.token_ids)} {one.reference!r}\n".encode())
            digest.update(one.token_ids.tobytes())
        return digest.hexdigest()[:16]

    def for_step(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        """The prompts of a step, by (seed, step) alone: each epoch goes through all of them in an order of its own."""
        if step < self.curriculum_steps:
            return self._of_curriculum(step, batch_size, seed)
        count = len(self.training)
        chosen: list[Prompt] = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, offset = divmod(position, count)
            chosen.append(self.training[_epoch_order(seed, epoch, count)[offset]])
        return chosen

    def reach(self, step: int, batch_size: int) -> list[Prompt]:
        """What a step may draw from: all prompts, and in a curriculum the shortest, of which each step takes in as many
        more (cf. Platanios et al. 2019), a batch at least.
        """
        if step >= self.curriculum_steps:
            return self.training
        count = len(self.training)
        reach = min(count, max(batch_size, math.ceil(count * (step + 1) / (self.curriculum_steps + 1))))
        return sorted(self.training, key=lambda prompt: (len(prompt.token_ids), prompt.index))[:reach]

    def _of_curriculum(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        shortest = self.reach(step, batch_size)
        order = np.random.default_rng([seed, 2, step]).permutation(len(shortest))
        return [shortest[order[position % len(shortest)]] for position in range(batch_size)]


@lru_cache(maxsize=2)  # A step may end one epoch and begin another. To shuffle a million takes 10 ms.
def _epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def check_lengths(prompts: PromptSet, max_sequence_tokens: int) -> None:
    """Raise PromptError when generation has no room for a response to some prompt, before a step comes to it.

    Args:
        prompts: all that the run may come to.
        max_sequence_tokens: prompt and response together.
    """
    longest = _longest(prompts)
    if len(longest.token_ids) >= max_sequence_tokens:
        raise PromptError(
            f"prompt {longest.index} has {len(longest.token_ids)} tokens, and generation takes {max_sequence_tokens}, "
            "a response included; shorten it, or set rollout.on_bad_sample to skip"
        )


def check_readers(prompts: PromptSet, max_sequence_tokens: int, max_tokens: int, reader: str, read_tokens: int) -> None:
    """Raise PromptError when some prompt with its longest response is more than a service reads, before one is made.

    Args:
        prompts: all that the run may come to.
        max_sequence_tokens: prompt and response together, as generation makes them.
        max_tokens: longest response.
        reader: the service that takes the shortest sequences.
        read_tokens: how long these may be.
    """
    longest = _longest(prompts)
    length = len(longest.token_ids)
    if min(length + max_tokens, max_sequence_tokens) > read_tokens:
        raise PromptError(
            f"prompt {longest.index} has {length} tokens, its response up to {max_tokens}; the {reader} "
            f"service takes {read_tokens} together; lower rollout.max_tokens, shorten the prompt, raise the service's "
            "batching.max_batch_tokens where its model reads more, or set rollout.on_bad_sample to skip"
        )


def _longest(prompts: PromptSet) -> Prompt:
    return max([*prompts.training, *prompts.heldout], key=lambda prompt: len(prompt.token_ids))


def load_prompts(config: PromptsConfig, encode: Encode, render: Render) -> PromptSet:
    """Read, encode, cut and split the prompts of a file; equal ones count once.

    Raises:
        PromptError: the file is missing or malformed, a prompt is empty, too few are left for training, or equal ones
            have different references.
    """
    texts = read_prompts(config.path, render)
    conversations = any(one.turns for one in texts)
    if config.first_tokens is not None and conversations:
        raise PromptError(
            f"prompts.first_tokens is {config.first_tokens}, which would cut conversations off; leave it out"
        )
    prompts = _different(_encoded(texts, lambda text: encode(text)[: config.first_tokens]))
    _check_count(len(prompts), config.heldout, "prompts")
    shuffled = _shuffled(prompts)
    return PromptSet(shuffled[config.heldout :], shuffled[: config.heldout], conversations=conversations)


def references_of(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """What responses to them are held against, one each; empty where there is nothing."""
    found = tuple(prompt.reference for prompt in prompts if prompt.reference is not None)
    return found if len(found) == len(prompts) else ()


def turns_of(prompts: Sequence[Prompt]) -> list[tuple[ChatTurn, ...]]:
    """The conversation that each was made of, for rewards that read text."""
    return [prompt.turns for prompt in prompts]


def split_episodes(beginnings: Iterable[str], encode: Encode, heldout: int) -> PromptSet:
    """Encode the beginnings of an environment's episodes, by their seeds from 0, and hold some episodes out.

    Episodes that begin alike count each: what an environment keeps to itself, such as a number to guess, may tell them
    apart. Those that begin as one that is held out are left out of training, unless too few begin differently for that.

    Raises:
        PromptError: a beginning is empty, or no episode is left for training.
    """
    prompts = _encoded([PromptText(beginning) for beginning in beginnings], encode)
    _check_count(len(prompts), heldout, "episodes")
    different = _different(prompts)
    if len(different) <= heldout:
        shuffled = _shuffled(prompts)
        return PromptSet(training=shuffled[heldout:], heldout=shuffled[:heldout])
    held = _shuffled(different)[:heldout]
    kept_out = {tuple(prompt.token_ids.tolist()) for prompt in held}
    training = [prompt for prompt in _shuffled(prompts) if tuple(prompt.token_ids.tolist()) not in kept_out]
    return PromptSet(training=training, heldout=held)


def _encoded(texts: Sequence[PromptText], encode: Encode) -> list[Prompt]:
    prompts: list[Prompt] = []
    for index, one in enumerate(texts):
        _check_unicode(index, one)
        tokens = encode(one.text)
        if not tokens:
            raise PromptError(
                f"prompt {index} ({one.text!r}): no tokens; expected at least one; remove it from the file"
            )
        prompts.append(Prompt(index, np.asarray(tokens, dtype=np.int32), one.reference, one.turns))
    return prompts


def _check_unicode(index: int, prompt: PromptText) -> None:
    """JSON may hold one half of a pair of surrogates, which is what becomes of a text that is cut within an emoji."""
    for text in (prompt.text, prompt.reference or "", *(turn.role + turn.content for turn in prompt.turns)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt {index} ({text!r}): {text[error.start]!r} at character {error.start} is no Unicode character; "
                "remove it from the file"
            ) from error


def _different(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of each token sequence."""
    seen: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        first = seen.setdefault(tuple(prompt.token_ids.tolist()), prompt)
        if first.reference != prompt.reference:
            raise PromptError(
                f"prompts {first.index} and {prompt.index} are equal, and their references are {first.reference!r} and "
                f"{prompt.reference!r}; remove one, or keep more first_tokens"
            )
    return list(seen.values())


def _check_count(count: int, heldout: int, what: str) -> None:
    if count <= heldout:
        raise PromptError(
            f"prompts.heldout is {heldout}, but there are only {count} different {what}; "
            "one at least must be left for training"
        )


def _shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    order = np.random.default_rng(_HELDOUT_SEED).permutation(len(prompts))
    return [prompts[position] for position in order]
