"""A tokenizer for texts, tokens and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ppod.tensors import TokenArray
from ppod_models.chat_template import render_chat
from ppod_models.loading import token_id_bound, tokenizer_fingerprint
from ppod_services.reward.samples import Turn

_BREAK = "\u200b"
"""A space of no width."""


class TokenizerCodec:
    """Encodes with a Rust tokenizer of its own.

    A copy, because the Python wrapper changes the settings of the one that it holds; and without the truncation and
    padding that some tokenizer files ask for, which would cut texts without a word.

    Attributes:
        fingerprint: see `ppod_models.loading.tokenizer_fingerprint`.
        bos_token_id: begin of sequence; None where the tokenizer has none.
        token_id_bound: see `ppod_models.loading.token_id_bound`.
        has_chat_template: whether it can `render`.
        longest_tokens: what the tokenizer's files say its model takes; huge where they say nothing.
        special_tokens_around: how many special tokens it puts before a text, and how many behind it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.token_id_bound = token_id_bound(tokenizer)
        self.bos_token_id = cast("int | None", tokenizer.bos_token_id)
        self.has_chat_template = bool(tokenizer.chat_template)
        self.longest_tokens = int(tokenizer.model_max_length)
        self._tokenizer = tokenizer
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        mask = self._backend.encode("a").special_tokens_mask
        before, all_of_them = (mask.index(0), sum(mask)) if 0 in mask else (0, 0)
        self.special_tokens_around = before, all_of_them - before
        specials = [added.content for added in tokenizer.added_tokens_decoder.values() if added.special]
        self._specials = [special for special in specials if len(special) > 1]

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[TokenArray]:
        """One int32 array a text."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: TokenArray) -> str:
        """Text without special tokens."""
        return self._backend.decode(tokens.tolist(), skip_special_tokens=True)

    def plain(self, text: str) -> str:
        """The text, with a space of no width in whatever would be read as a special token."""
        for special in self._specials:
            while special in text:
                text = text.replace(special, special[0] + _BREAK + special[1:])
        return text

    def render(self, turns: Sequence[Turn], *, open_turn: bool) -> str:
        """Apply the chat template."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return render_chat(self._tokenizer, messages, open_turn=open_turn)
