"""What is known of one completion while it grows: its record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer

from ppod_services.generation.draws import Draws
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, VersionSpan
from ppod_services.generation.shaping import LogitShape
from ppod_services.generation.stop_texts import StopTexts


@dataclass(frozen=True, slots=True)
class NewToken:
    """One token as it was drawn; see `GeneratedSample` for its logprobs. `unscaled` is NaN where nobody asked."""

    token: int
    logprob: float
    unscaled: float


@dataclass(slots=True, eq=False)
class Row:
    """One completion.

    Attributes:
        position: in the batch.
        item: what was asked for.
        draws: its random numbers.
        shape: what is done to its logits; None: nothing.
        stops: finds its stop texts; None: there are none.
        prompt_version: version of the weights that computed its prompt.
        ending: why it ended; None: it goes on.
    """

    position: int
    item: GenerationItem
    draws: Draws
    shape: LogitShape | None
    stops: StopTexts | None
    prompt_version: int
    ending: Ending | None = None
    _tokens: list[NewToken] = field(default_factory=list[NewToken])
    _spans: list[VersionSpan] = field(default_factory=list[VersionSpan])

    @staticmethod
    def open(position: int, item: GenerationItem, tokenizer: Tokenizer, device: torch.device, version: int) -> Row:
        """A completion without tokens."""
        stops: StopTexts | None = None
        if item.stop_strings:
            prompt: list[int] = item.prompt.tolist()
            begin = len(prompt) - item.resumed
            stops = StopTexts(tokenizer, item.stop_strings, prompt[:begin], prompt[begin:])
        shape = LogitShape.of(item.token_filter, item.prompt, item.max_tokens, device)
        return Row(position, item, Draws(item.seed, item.resumed), shape, stops, version)

    @property
    def last_token(self) -> int:
        """What the model is fed next."""
        return self._tokens[-1].token if self._tokens else int(self.item.prompt[-1])

    @property
    def finite(self) -> bool:
        """Whether the last token, if there is one, was drawn from a distribution."""
        return not self._tokens or math.isfinite(self._tokens[-1].logprob)

    @property
    def last_logprob(self) -> str:
        """For errors."""
        return str(self._tokens[-1].logprob)

    @property
    def final_length(self) -> int:
        """Most tokens that the sequence will have, prompt and completion."""
        return len(self.item.prompt) + self.item.max_tokens

    def add(self, new: NewToken, version: int) -> None:
        """Take the next token, which this version of the weights made."""
        self._tokens.append(new)
        if self._spans and self._spans[-1].weight_version == version:
            self._spans[-1] = VersionSpan(version, self._spans[-1].tokens + 1)
        else:
            self._spans.append(VersionSpan(version, 1))
        if self.shape is not None:
            self.shape.add(new.token)
        # Each token must pass by, or the text would have a gap.
        stop_text = self.stops is not None and self.stops.completes(new.token)
        if new.token in self.item.stop_ids:
            self.ending = Ending.STOP
        elif stop_text:
            self.ending = Ending.STOP_STRING
        elif len(self._tokens) == self.item.max_tokens:
            self.ending = Ending.LENGTH

    def sample(self, ending: Ending, version: int) -> GeneratedSample:
        """The completion as it is now; `version` serves where no token tells one."""
        tokens = self._tokens
        unscaled = np.asarray([new.unscaled for new in tokens], dtype=np.float32) if self.item.unscaled else None
        return GeneratedSample(
            tokens=np.asarray([new.token for new in tokens], dtype=np.int32),
            logprobs=np.asarray([new.logprob for new in tokens], dtype=np.float32),
            unscaled_logprobs=unscaled,
            ending=ending,
            weight_version=self._spans[-1].weight_version if self._spans else version,
            spans=tuple(self._spans),
        )
