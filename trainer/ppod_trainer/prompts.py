"""Prompts: where they come from, which are held out, and in which order they are used."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ppod.tensors import TokenArray
from ppod_trainer.config import PromptsConfig
from ppod_trainer.errors import PromptError

_HELDOUT_SEED = 20161  # Fixed, so that runs with different seeds are judged on the same prompts.

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its position in the set (for messages), and its token ids, int32 [length]."""

    index: int
    token_ids: TokenArray


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Training and held-out prompts; no token sequence is in both, unless too many episodes begin alike.

    Attributes:
        training, heldout: the prompts.
        curriculum_steps: first steps, whose prompts are the shorter ones; 0: none.
    """

    training: list[Prompt]
    heldout: list[Prompt]
    curriculum_steps: int = 0

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


def load_prompts(config: PromptsConfig, encode: Encode) -> PromptSet:
    """Read, encode, cut and split the prompts of a file; equal ones count once.

    Raises:
        PromptError: the file is missing or malformed, a prompt is empty, or too few are left for training.
    """

    def encode_first(text: str) -> list[int]:
        return encode(text)[: config.first_tokens]

    return split_prompts(_read_texts(config.path), encode_first, config.heldout)


def split_prompts(texts: Iterable[str], encode: Encode, heldout: int) -> PromptSet:
    """Encode texts, the first of which has index 0, and hold some out; equal ones count once. Errors as above."""
    prompts = _different(_encoded(texts, encode))
    _check_count(len(prompts), heldout, "prompts")
    shuffled = _shuffled(prompts)
    return PromptSet(training=shuffled[heldout:], heldout=shuffled[:heldout])


def split_episodes(beginnings: Iterable[str], encode: Encode, heldout: int) -> PromptSet:
    """Encode the beginnings of an environment's episodes, by their seeds from 0, and hold some episodes out.

    Episodes that begin alike count each: what an environment keeps to itself, such as a number to guess, may tell them
    apart. Those that begin as one that is held out are left out of training, unless too few begin differently for that.

    Raises:
        PromptError: a beginning is empty, or no episode is left for training.
    """
    prompts = _encoded(beginnings, encode)
    _check_count(len(prompts), heldout, "episodes")
    different = _different(prompts)
    if len(different) <= heldout:
        shuffled = _shuffled(prompts)
        return PromptSet(training=shuffled[heldout:], heldout=shuffled[:heldout])
    held = _shuffled(different)[:heldout]
    kept_out = {tuple(prompt.token_ids.tolist()) for prompt in held}
    training = [prompt for prompt in _shuffled(prompts) if tuple(prompt.token_ids.tolist()) not in kept_out]
    return PromptSet(training=training, heldout=held)


def _encoded(texts: Iterable[str], encode: Encode) -> list[Prompt]:
    prompts: list[Prompt] = []
    for index, text in enumerate(texts):
        tokens = encode(text)
        if not tokens:
            raise PromptError(f"prompt {index} ({text!r}): no tokens; expected at least one; remove it from the file")
        prompts.append(Prompt(index, np.asarray(tokens, dtype=np.int32)))
    return prompts


def _different(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of each token sequence."""
    seen: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        seen.setdefault(tuple(prompt.token_ids.tolist()), prompt)
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


def _read_texts(path: Path | None) -> list[str]:
    if path is None:
        path = Path(str(files("ppod_trainer") / "data" / "movie_review_ratings.tsv"))
    readers = {".tsv": _read_tsv, ".jsonl": _read_jsonl, ".txt": _read_lines}
    reader = readers.get(path.suffix)
    if reader is None:
        raise PromptError(f"prompts.path {path}: unknown kind {path.suffix!r}; expected {', '.join(readers)}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompts.path {path}: cannot be read: {error}") from error
    return reader(path, content)


def _read_tsv(path: Path, content: str) -> list[str]:
    rows = csv.DictReader(_lines(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "text" not in (rows.fieldnames or []):
        raise PromptError(f"prompts.path {path}: the header has {rows.fieldnames}; expected a column `text`")
    return [str(row["text"] or "") for row in rows]


def _read_jsonl(path: Path, content: str) -> list[str]:
    texts: list[str] = []
    for number, line in enumerate(_lines(content), start=1):
        try:
            record: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"prompts.path {path}, line {number}: not JSON: {error}") from error
        text = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise PromptError(f"prompts.path {path}, line {number}: found {line[:60]!r}, expected a string `prompt`")
        texts.append(text)
    return texts


def _read_lines(path: Path, content: str) -> list[str]:
    del path
    return _lines(content)


def _lines(content: str) -> list[str]:
    """Unlike `str.splitlines`, which also cuts where a text holds a form feed, or a separator of paragraphs."""
    return content.removesuffix("\n").split("\n") if content else []
