"""A tokenizer whose tokens are words, and whose decoder drops the space before the first one, as Llama 2's does."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def joined_words(*words: str) -> Tokenizer:
    """Token 0 is unknown, the words follow."""
    pieces = ["<unk>", *(f"\u2581{word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: token for token, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer
