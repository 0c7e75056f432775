"""Texts that a caller hands over, checked before a message takes them; free of I/O."""

from __future__ import annotations

from collections.abc import Sequence

from ppod.errors import InvalidArgument

_SHOWN = 40


def check_texts(field: str, texts: Sequence[str]) -> list[int]:
    """Lengths of texts in bytes of UTF-8.

    Raises:
        InvalidArgument: they are one text, whose characters would each be taken for one; or a text has no UTF-8.
    """
    if isinstance(texts, str):
        raise InvalidArgument(field, f"one text, {texts[:_SHOWN]!r}", "a sequence of texts")
    return [_utf8_bytes(field, text, sample) for sample, text in enumerate(texts)]


def _utf8_bytes(field: str, text: str, sample: int) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        found = f"{text[error.start : error.end][:_SHOWN]!r} at character {error.start}"
        # What Python makes of bytes in another encoding, in file names, arguments and standard input.
        raise InvalidArgument(field, found, "Unicode text, without lone surrogates", sample) from error
