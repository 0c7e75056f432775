"""Text of parts of a sequence. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ppod.tensors import TokenArray


def decode_parts(decode: Callable[[TokenArray], str], tokens: TokenArray, ends: Sequence[int]) -> list[str]:
    """The text of each part of a sequence, so that all of them joined are the text of the sequence.

    A part that is decoded by itself may lack something: many decoders drop the space before the first word.

    Args:
        decode: turns token ids into text.
        tokens: int32 [length].
        ends: where each part ends and the next one begins, growing.
    """
    parts: list[str] = []
    start, before = 0, ""
    for end in ends:
        text = decode(tokens[:end])
        # Not so where a part ends within a character.
        parts.append(text[len(before) :] if text.startswith(before) else decode(tokens[start:end]))
        start, before = end, text
    return parts
