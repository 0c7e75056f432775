"""A task that a random transformer learns by reinforcement alone within a minute: say the letters of the prompt again.

Each letter in its place pays a part of 1, because no random policy would ever say all of them right: of 13 tokens it
says the right three once in 2,197 answers. That density is what makes the task one of a minute, not of a day.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ppod_trainer.environments import Reply

LETTERS = "abcdefghij"
SIGN = ">"
EOS = "<|end|>"
PAD = "<|pad|>"


class CopyingParameters(BaseModel):
    """What is to be copied."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(default=3, ge=1, le=8)


class Copying:
    """One word: the prompt is "bad>", the right answer "bad"."""

    parameters_type = CopyingParameters
    stop = ()

    def __init__(self, parameters: CopyingParameters) -> None:
        self._length = parameters.length
        self._word = ""

    def reset(self, seed: int) -> str:
        draw = random.Random(seed)
        self._word = "".join(draw.choice(LETTERS) for _ in range(self._length))
        return self._word + SIGN

    def step(self, action: str) -> Reply:
        right = sum(said == wanted for said, wanted in zip(action, self._word, strict=False))
        return Reply("", right / self._length, done=True)


class Spelling:
    """The same word, a letter a turn, and all of it is paid at the end: a delayed reward."""

    parameters_type = CopyingParameters
    stop = tuple(LETTERS)

    def __init__(self, parameters: CopyingParameters) -> None:
        self._copying = Copying(parameters)
        self._length = parameters.length
        self._said: list[str] = []

    def reset(self, seed: int) -> str:
        return self._copying.reset(seed)

    def step(self, action: str) -> Reply:
        self._said.append(action[:1] or SIGN)
        if len(self._said) < self._length:
            return Reply("", 0.0, done=False)
        return self._copying.step("".join(self._said))


def save_copying_model(directory: Path, *, seed: int = 0) -> Path:
    """Save a random transformer of one token a letter, which has never seen any text; returns the directory."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS + SIGN)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    torch.manual_seed(seed)
    # With positions that are learned a random model finds the place to copy from in tens of steps, with rotary ones in
    # hundreds, or never.
    config = GPT2Config(
        vocab_size=len(saved),
        n_positions=32,
        n_embd=64,
        n_layer=1,
        n_head=2,
        n_inner=128,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=saved.eos_token_id,
        pad_token_id=saved.pad_token_id,
    )
    GPT2LMHeadModel(config).eval().save_pretrained(directory)
    saved.save_pretrained(directory)
    return directory
