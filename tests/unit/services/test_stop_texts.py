"""Stop texts, found token by token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ppod_services.generation.stop_texts import StopTexts
from support.tiny_model import build_tokenizer

BYTES = build_tokenizer().backend_tokenizer


def words() -> Tokenizer:
    """Tokens that are words, joined by what stands before: as SentencePiece's."""
    pieces = ["<unk>", "▁Hello", "▁world", "!", "▁stop", "ping", "▁", "<0xE2>", "<0x82>", "<0xAC>"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def completing(stops: StopTexts, tokens: list[int]) -> int | None:
    """Position of the first token that completes a stop text."""
    return next((position for position, token in enumerate(tokens) if stops.completes(token)), None)


@pytest.mark.parametrize(
    ("text", "stops", "at"),
    [
        ("abcabd", ("abd",), 5),
        ("abcabd", ("zz", "ca"), 3),
        ("aaab", ("aab",), 3),
        ("a", ("a",), 0),
        ("abc", ("abcd",), None),
        ("né", ("é",), 2),
        ("n€uro", ("€",), 3),
        ("\N{OLD ITALIC LETTER A}x", ("x",), 4),
        ("\N{OLD ITALIC LETTER A}x", ("\N{OLD ITALIC LETTER A}",), 3),
    ],
)
def test_the_token_that_completes_a_text(text: str, stops: tuple[str, ...], at: int | None) -> None:
    assert completing(StopTexts(BYTES, stops, []), BYTES.encode(text).ids) == at


def test_bytes_that_make_no_character_hide_nothing_after_them() -> None:
    lone, letter = BYTES.encode("é").ids[0], BYTES.encode("x").ids[0]
    assert completing(StopTexts(BYTES, ("x",), []), [lone, letter]) == 1
    # The text before a character that is begun counts at once.
    assert completing(StopTexts(BYTES, ("x",), []), [letter, lone]) == 0


def test_what_was_sampled_before_counts_and_the_prompt_does_not() -> None:
    s, t = BYTES.encode("s").ids[0], BYTES.encode("t").ids[0]
    assert completing(StopTexts(BYTES, ("st",), [s]), [t, s, t]) == 2
    assert completing(StopTexts(BYTES, ("st",), [], [s]), [t]) == 0
    assert completing(StopTexts(BYTES, ("st",), [], [s, t]), [s, t]) == 1, "what it held already ends nothing"


def test_a_character_may_begin_before_the_interruption() -> None:
    first, *rest = BYTES.encode("€").ids
    assert completing(StopTexts(BYTES, ("€",), [40], [first]), rest) == 1


def test_words_are_joined_by_what_stands_before() -> None:
    tokenizer = words()
    assert completing(StopTexts(tokenizer, (" world",), [1]), [2]) == 0
    assert completing(StopTexts(tokenizer, ("o stop",), [], [1]), [4]) == 0
    assert completing(StopTexts(tokenizer, ("stopping",), [1]), [4, 5]) == 1
    assert completing(StopTexts(tokenizer, ("€!",), [1]), [7, 8, 9, 3]) == 3


def test_a_prompt_that_ends_inside_of_a_character_hides_nothing_after_it() -> None:
    """SentencePiece's decoders show each byte of what is no character yet."""
    tokenizer = words()
    assert completing(StopTexts(tokenizer, ("!",), [1, 7, 8]), [9, 3]) == 1
    assert completing(StopTexts(tokenizer, ("! stop",), [1, 7, 8]), [9, 3, 4]) == 2
    assert completing(StopTexts(tokenizer, ("!",), [1, 7]), [8, 9, 3]) == 2
    assert completing(StopTexts(tokenizer, ("!",), [1, 7, 8]), [3]) == 0, "it never becomes a character"
    first, second, last = BYTES.encode("€").ids
    letter = BYTES.encode("x").ids[0]
    for tokens, at in (([last, letter], 1), ([letter], 0)):
        assert completing(StopTexts(BYTES, ("x",), [40, first, second]), tokens) == at


def test_special_tokens_and_ids_without_text_add_nothing() -> None:
    letters = BYTES.encode("ab").ids
    assert completing(StopTexts(BYTES, ("ab",), []), [letters[0], 256, 319, letters[1]]) == 3


def test_long_completions_are_decoded_in_pieces() -> None:
    """As by a search in the whole text, whatever the neighbours."""
    text = "The quick brown fox — jumps over 12 lazy dogs… and naps. " * 20
    tokens = BYTES.encode(text).ids
    stop = "dogs… and naps. The quick brown fox — jumps over 12 lazy dogs… and n"
    expected = next(end for end in range(len(tokens)) if stop in BYTES.decode(tokens[: end + 1]))
    assert completing(StopTexts(BYTES, (stop,), []), tokens) == expected
