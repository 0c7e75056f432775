"""How sequences of every form become inputs of a reward model. Pure but for the tokenizer that it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppod.errors import InvalidArgument
from ppod.tensors import TokenArray
from ppod_models.chat_template import ChatTemplateError
from ppod_models.decoding import decode_parts
from ppod_services.core.described import check_length
from ppod_services.reward.requests import ModelInput
from ppod_services.reward.samples import (
    ChatContent,
    Codec,
    Content,
    IntArray,
    PlainText,
    Query,
    Sample,
    TextContent,
    TokenContent,
    Truncation,
    Turn,
    read_text,
)

_NO_TOKENS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Reader:
    """How a model reads.

    Attributes:
        name: of the reward, for errors.
        codec: the model's tokenizer.
        vocab_size: the model takes ids from 0 to vocab_size - 1; its tokenizer may make others.
        special_tokens: whether the tokenizer's own special tokens go around a text.
        same_tokens: whether the request's token ids are the model's.
        source: the tokenizer of the request's token ids, to decode those of another; None where it is unknown.
    """

    name: str
    codec: Codec
    vocab_size: int
    special_tokens: bool
    same_tokens: bool
    source: Codec | None


def encode_whole(samples: Sequence[Sample], reader: Reader) -> list[TokenArray]:
    """Token ids of whole sequences, int32 [length] each.

    Raises:
        InvalidArgument: a text without a token, a conversation that the chat template refuses, token ids that the
            model does not have.
    """
    found: list[TokenArray | None] = [_own_tokens(sample, reader) for sample in samples]
    rest = [index for index, tokens in enumerate(found) if tokens is None]
    for special in (False, True):
        chosen = [index for index in rest if _gets_special_tokens(samples[index], reader) is special]
        if chosen:
            texts = [_whole_text(samples[index], reader) for index in chosen]
            for index, tokens in zip(chosen, reader.codec.encode(texts, special_tokens=special), strict=True):
                found[index] = tokens
    sequences = [_not_empty(sample, tokens) for sample, tokens in zip(samples, found, strict=True)]
    check_ids(samples, sequences, reader)
    return sequences


def truncate(
    samples: Sequence[Sample], sequences: Sequence[TokenArray], query: Query, reader: Reader, most: int
) -> list[TokenArray]:
    """Cut what `encode_whole` gave to `most` tokens, on the side that the query asks for.

    Special tokens around a text stay: many encoders read the score at the first of them.

    Raises:
        InvalidArgument: a sequence is too long, and no side is asked for.
    """
    cut: list[TokenArray] = []
    for sample, tokens in zip(samples, sequences, strict=True):
        if query.truncation is Truncation.NONE:
            check_length(sample.index, len(tokens), sample.sized_field, most)
        lost = len(tokens) - most
        if lost <= 0:
            cut.append(tokens)
            continue
        before, behind = reader.codec.special_tokens_around if _gets_special_tokens(sample, reader) else (0, 0)
        start = before if query.truncation is Truncation.LEFT else len(tokens) - behind - lost
        cut.append(np.delete(tokens, slice(start, start + lost)))
    return cut


def encode_steps(sample: Sample, positions: Sequence[int], separator: str, reader: Reader) -> ModelInput:
    """A sequence for a process reward model, read at the end of each step.

    As TRL's PRMTrainer builds it: every step is tokenised by itself and followed by the separator, whose last token is
    read; a tokenizer's begin of sequence goes before a text.

    Args:
        sample: the sequence.
        positions: where its steps end.
        separator: what goes after each step.
        reader: of the model.

    Raises:
        InvalidArgument: as `encode_whole`.
    """
    prompt, pieces = _pieces(sample, positions, reader)
    end = reader.codec.encode([separator], special_tokens=False)[0]
    steps = [_without(piece, separator) for piece in pieces]
    encoded = reader.codec.encode(steps, special_tokens=False)
    parts = [prompt]
    reads: list[int] = []
    length = len(prompt)
    for tokens in encoded:
        parts += [tokens, end]
        length += len(tokens) + len(end)
        reads.append(length - 1)
    whole = _not_empty(sample, np.concatenate(parts))
    check_ids([sample], [whole], reader)
    return ModelInput(whole, np.asarray(reads, dtype=np.int32))


def truncate_reads(sample: Sample, one: ModelInput, side: Truncation, most: int) -> tuple[ModelInput, int]:
    """Cut an input to `most` tokens without losing a place that is read; returns it and the tokens dropped.

    Raises:
        InvalidArgument: it is too long, and may not be cut or only through a step's end, as always on the right.
    """
    lost = len(one.tokens) - most
    if lost <= 0:
        return one, 0
    reads: IntArray = one.reads - lost
    if side is Truncation.LEFT and reads[0] >= 0:
        return ModelInput(one.tokens[lost:], reads), lost
    expected = f"at most {most} tokens, or TRUNCATION_SIDE_LEFT and fewer to cut than stand before the first step's end"
    raise InvalidArgument(sample.sized_field, f"{len(one.tokens)} tokens", expected, sample.index)


def _own_tokens(sample: Sample, reader: Reader) -> TokenArray | None:
    match sample.content:
        case TokenContent(tokens, _) if reader.same_tokens:
            return tokens
        case _:
            return None


def _gets_special_tokens(sample: Sample, reader: Reader) -> bool:
    """Whether the tokenizer puts its special tokens around a sample; a rendered conversation brings them along."""
    match sample.content:
        case ChatContent():
            return False
        case TokenContent() if reader.same_tokens or _applied(sample, reader):
            return False
        case _:
            return reader.special_tokens


def _applied(sample: Sample, reader: Reader) -> tuple[Turn, ...]:
    """The turns of a prompt that the model's chat template is applied to, as its ids are another's; empty: none."""
    match sample.content:
        case TokenContent(_, _, turns) if reader.codec.has_chat_template and not reader.same_tokens:
            return turns
        case _:
            return ()


def _whole_text(sample: Sample, reader: Reader) -> str:
    match sample.content:
        case ChatContent(turns):
            return _render(sample, reader, ChatContent(turns), open_turn=False)
        case TokenContent() if turns := _applied(sample, reader):
            last = Turn("assistant", reader.codec.plain(read_text(sample, reader.source).response))
            return _render(sample, reader, ChatContent((*turns, last)), open_turn=False)
        case TokenContent():
            # Their own special tokens are none of the text.
            text = read_text(sample, reader.source)
            return reader.codec.plain(text.prompt + text.response)
        case TextContent(prompt, response):
            return prompt + response


def _pieces(sample: Sample, positions: Sequence[int], reader: Reader) -> tuple[TokenArray, list[str]]:
    """The tokens of the prompt, and the text of each step."""
    content: Content = sample.content
    match content:
        case TokenContent(tokens, prompt_length):
            if reader.source is None:
                read_text(sample, None)
            source = reader.source or reader.codec
            _, *pieces = decode_parts(source.decode, tokens, (prompt_length, *positions))
            if reader.same_tokens:
                prompt = tokens[:prompt_length]
            elif turns := _applied(sample, reader):
                prompt = _encode_turns(sample, turns, reader)
            else:
                text = read_text(sample, source)
                prompt = _encode_prompt(PlainText(reader.codec.plain(text.prompt), text.response), reader)
            return prompt, [reader.codec.plain(piece) for piece in pieces]
        case ChatContent(turns):
            response = turns[-1].content
            prompt = _encode_turns(sample, turns[:-1], reader)
        case TextContent():
            response = content.response
            prompt = _encode_prompt(PlainText(content.prompt, response), reader)
    starts = (0, *positions[:-1])
    return prompt, [response[a:b] for a, b in zip(starts, positions, strict=True)]


def _encode_turns(sample: Sample, turns: tuple[Turn, ...], reader: Reader) -> TokenArray:
    opening = _render(sample, reader, ChatContent(turns), open_turn=True)
    return reader.codec.encode([opening], special_tokens=False)[0]


def _encode_prompt(text: PlainText, reader: Reader) -> TokenArray:
    tokens = reader.codec.encode([text.prompt], special_tokens=False)[0] if text.prompt else _NO_TOKENS
    bos = reader.codec.bos_token_id
    return tokens if bos is None else np.concatenate([np.asarray([bos], dtype=np.int32), tokens])


def _render(sample: Sample, reader: Reader, chat: ChatContent, *, open_turn: bool) -> str:
    try:
        return reader.codec.render(chat.turns, open_turn=open_turn)
    except ChatTemplateError as error:
        expected = f"a conversation that the model of {reader.name!r} takes, or texts"
        field = "prompts" if isinstance(sample.content, TokenContent) else sample.field
        raise InvalidArgument(field, str(error), expected, sample.index) from error


def _without(piece: str, separator: str) -> str:
    while piece.startswith(separator):
        piece = piece.removeprefix(separator)
    while piece.endswith(separator):
        piece = piece.removesuffix(separator)
    return piece


def _not_empty(sample: Sample, tokens: TokenArray | None) -> TokenArray:
    if tokens is None or not len(tokens):
        field = "texts.texts" if isinstance(sample.content, TextContent) else sample.field
        raise InvalidArgument(field, "a text without a single token", "at least one token", sample.index)
    return tokens


def check_ids(samples: Sequence[Sample], sequences: Sequence[TokenArray], reader: Reader) -> None:
    """Raise InvalidArgument for an id that the model has no embedding for: it would break all that share the batch."""
    if np.concatenate(sequences).max() < reader.vocab_size:
        return
    for sample, tokens in zip(samples, sequences, strict=True):
        highest = int(tokens.max())
        if highest >= reader.vocab_size:
            expected = f"ids from 0 to {reader.vocab_size - 1}: the model of {reader.name!r} has no others"
            raise InvalidArgument(sample.field, f"token id {highest}", expected, sample.index)


def at_end(tokens: TokenArray, end: int) -> ModelInput:
    """A sequence that is read once."""
    return ModelInput(tokens, np.asarray([end], dtype=np.int32))
