"""Reads the messages of a request. The only place, with `replies` and the servicers, that knows them."""

from __future__ import annotations

from collections.abc import Sequence

from ppod.errors import InvalidArgument
from ppod.tensors import check_token_ids, unpack_sequences
from ppod.v1 import common_pb2, reward_pb2
from ppod_services.core.described import check_count
from ppod_services.reward.samples import (
    ChatContent,
    Content,
    Granularity,
    Sample,
    TextContent,
    TokenContent,
    TokenSource,
    Truncation,
    Turn,
)

_ANY_ID = 2**31


def read_samples(
    request: reward_pb2.ScoreRequest, source: TokenSource | None, most: int, *, needs_references: bool
) -> tuple[Sample, ...]:
    """The sequences of a request, checked for all that needs no tokenizer.

    Args:
        request: the message.
        source: what made its token ids, if there are any; None where the service has no tokenizer.
        most: most sequences in a request.
        needs_references: whether the reward compares with references.

    Raises:
        InvalidArgument: names field and sample.
    """
    kind = request.WhichOneof("input")
    if kind != "tokens" and request.prompt_lengths:
        raise InvalidArgument("prompt_lengths", f"{len(request.prompt_lengths)} values", "none with texts")
    if kind != "tokens" and request.HasField("prompts"):
        raise InvalidArgument("prompts", f"{len(request.prompts.conversations)} conversations", "none but with tokens")
    match kind:
        case "tokens":
            contents: Sequence[Content] = _read_tokens(request, source, most)
        case "texts":
            contents = _read_texts(request.texts, most)
        case "conversations":
            contents = _read_conversations(request.conversations, most)
        case _:
            raise InvalidArgument("input", "nothing", "tokens, texts or conversations")
    references = _read_references(request, len(contents), needs_references)
    return tuple(
        Sample(index, content, reference)
        for index, (content, reference) in enumerate(zip(contents, references, strict=True))
    )


def read_truncation(side: int) -> Truncation:
    """The truncation asked for; raise InvalidArgument for a number that the contract does not have."""
    try:
        return Truncation(side or Truncation.NONE.value)
    except ValueError as error:
        raise InvalidArgument("truncation", str(side), "a value of ppod.v1.TruncationSide") from error


def read_granularity(process: int, interval: int) -> Granularity | None:
    """The granularity asked for, or None.

    Raises:
        InvalidArgument: a number that the contract does not have, or an interval without tokens to count.
    """
    if interval and process != Granularity.TOKEN.value:
        raise InvalidArgument("process_interval", str(interval), "0, but with PROCESS_GRANULARITY_TOKEN")
    try:
        return Granularity(process) if process else None
    except ValueError as error:
        raise InvalidArgument("process", str(process), "a value of ppod.v1.ProcessGranularity") from error


def _read_tokens(request: reward_pb2.ScoreRequest, source: TokenSource | None, most: int) -> list[TokenContent]:
    if source is None:
        raise InvalidArgument("input", "tokens", "texts or conversations: this service has no tokenizer")
    check_count(len(request.tokens.lengths), "tokens", most)
    sequences = unpack_sequences(request.tokens, "tokens")
    check_token_ids(sequences, _ANY_ID if source.only_decoded else source.vocab_size, "tokens")
    prompts = list(request.prompt_lengths) or [0] * len(sequences)
    if len(prompts) != len(sequences):
        raise InvalidArgument("prompt_lengths", f"{len(prompts)} values", f"{len(sequences)}, one a sequence, or none")
    for sample, (tokens, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        if prompt >= len(tokens):
            raise InvalidArgument("prompt_lengths", str(prompt), f"less than the {len(tokens)} tokens", sample)
    turns = _read_prompts(request, len(sequences))
    return [TokenContent(*one) for one in zip(sequences, prompts, turns, strict=True)]


def _read_prompts(request: reward_pb2.ScoreRequest, count: int) -> list[tuple[Turn, ...]]:
    """The turns of each sequence's prompt; empty where it is no conversation."""
    if not request.HasField("prompts"):
        return [()] * count
    found = request.prompts.conversations
    if len(found) != count:
        raise InvalidArgument("prompts", f"{len(found)} conversations", f"{count}, one a sequence, or none")
    if not request.prompt_lengths:
        raise InvalidArgument("prompts", "conversations", "prompt_lengths beside them, or none")
    return [_read_turns(conversation, "prompts", sample) for sample, conversation in enumerate(found)]


def _read_texts(message: common_pb2.TextSequences, most: int) -> list[TextContent]:
    texts = list(message.texts)
    check_count(len(texts), "texts", most)
    prompts = list(message.prompts) or [""] * len(texts)
    if len(prompts) != len(texts):
        raise InvalidArgument("texts.prompts", f"{len(prompts)} prompts", f"{len(texts)}, one a text, or none")
    for sample, text in enumerate(texts):
        if not text:
            raise InvalidArgument("texts.texts", "an empty text", "at least one character", sample)
    return [TextContent(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def _read_conversations(message: reward_pb2.Conversations, most: int) -> list[ChatContent]:
    check_count(len(message.conversations), "conversations", most)
    found: list[ChatContent] = []
    for sample, conversation in enumerate(message.conversations):
        turns = _read_turns(conversation, "conversations", sample)
        if not turns:
            raise InvalidArgument("conversations", "no message", "at least one message", sample)
        found.append(ChatContent(turns))
    return found


def _read_turns(conversation: reward_pb2.Conversation, field: str, sample: int) -> tuple[Turn, ...]:
    turns = tuple(Turn(one.role, one.content) for one in conversation.messages)
    if not all(turn.role for turn in turns):
        raise InvalidArgument(f"{field}.messages.role", "an empty role", "user, assistant or another", sample)
    return turns


def _read_references(request: reward_pb2.ScoreRequest, count: int, needed: bool) -> list[str | None]:
    references = list(request.references)
    if not references:
        if needed:
            raise InvalidArgument("references", "none", f"{count}: this reward compares with them")
        return [None] * count
    if len(references) != count:
        raise InvalidArgument("references", f"{len(references)} references", f"{count}, one a sequence, or none")
    return list(references)
