"""What a request asks to score, in the forms that it comes in. Free of torch and of protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ppod.errors import InvalidArgument
from ppod.tensors import FloatArray, TokenArray
from ppod_models.decoding import decode_parts
from ppod_services.core.callers import Caller
from ppod_services.reward.rendezvous import Rendezvous

if TYPE_CHECKING:
    from ppod_services.reward.requests import RewardItem

IntArray = npt.NDArray[np.int32]

_MOST_PREFIX_CHARACTERS = 2**26


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, eq=False)
class TokenContent:
    """A whole sequence, int32 [length]; its first `prompt_length` tokens are the prompt, fewer than all.

    `turns` are what the prompt was made of, for whatever reads text; empty where it is no conversation.
    """

    tokens: TokenArray
    prompt_length: int
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class TextContent:
    """A text, and what stands before it."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class ChatContent:
    """A conversation; its last turn is what is scored."""

    turns: tuple[Turn, ...]


Content = TokenContent | TextContent | ChatContent


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence to score: its position in the request, for errors, and the answer to hold it against."""

    index: int
    content: Content
    reference: str | None = None

    @property
    def field(self) -> str:
        """The field of the request that it came in."""
        match self.content:
            case TokenContent():
                return "tokens"
            case TextContent():
                return "texts"
            case ChatContent():
                return "conversations"

    @property
    def sized_field(self) -> str:
        """The field that says, or shows, how long it is."""
        return "tokens.lengths" if isinstance(self.content, TokenContent) else f"{self.field}.{self.field}"

    def prefix(self, position: int) -> Sample:
        """The same sequence up to a position: tokens of the whole, or characters of the response."""
        match self.content:
            case TokenContent(tokens, prompt_length, turns):
                content: Content = TokenContent(tokens[:position], prompt_length, turns)
            case TextContent(prompt, response):
                content = TextContent(prompt, response[:position])
            case ChatContent(turns):
                last = replace(turns[-1], content=turns[-1].content[:position])
                content = ChatContent((*turns[:-1], last))
        return Sample(self.index, content, self.reference)


class Truncation(Enum):
    """Where too long a sequence is cut; the numbers of `ppod.v1.TruncationSide`."""

    NONE = 1
    LEFT = 2
    RIGHT = 3


class Granularity(Enum):
    """How finely the way is scored; the numbers of `ppod.v1.ProcessGranularity`."""

    STEP = 1
    TOKEN = 2


@dataclass(frozen=True, slots=True)
class Steps:
    """Where each sequence is scored: growing positions, the last one its end. Units as in `Sample.prefix`."""

    granularity: Granularity
    positions: tuple[tuple[int, ...], ...]


class Codec(Protocol):
    """A tokenizer; every method may be called from any one thread at a time."""

    @property
    def fingerprint(self) -> str:
        """See `ppod_models.loading.tokenizer_fingerprint`."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Begin of sequence; None where the tokenizer has none."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether it can `render`."""
        ...

    @property
    def special_tokens_around(self) -> tuple[int, int]:
        """How many special tokens it puts before a text, and how many behind it."""
        ...

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[TokenArray]:
        """One int32 array a text; `special_tokens` adds those that the tokenizer puts around a text."""
        ...

    def decode(self, tokens: TokenArray) -> str:
        """Text without special tokens."""
        ...

    def plain(self, text: str) -> str:
        """The text such that no part of it is a special token: for what a policy wrote, that could spell one.

        Read as such it would end its turn, and say the rest as if it were somebody else.
        """
        ...

    def render(self, turns: Sequence[Turn], *, open_turn: bool) -> str:
        """Apply the chat template; `open_turn` begins the assistant's turn. Raise ChatTemplateError when it cannot."""
        ...


@dataclass(frozen=True, slots=True)
class TokenSource:
    """The tokenizer that made the token ids of a request.

    Attributes:
        codec: it.
        vocab_size: ids are below this; with `only_decoded` those that stand for text are.
        only_decoded: no model here takes its ids. A policy may have embeddings for more ids than its tokenizer makes,
            and may sample them; they stand for no text.
    """

    codec: Codec
    vocab_size: int
    only_decoded: bool = False


@dataclass(frozen=True, slots=True)
class Query:
    """A request, ready to be scored.

    Attributes:
        samples: in the request's order.
        truncation: what to do with too long a sequence.
        caller: whose it is.
        deadline: when it is worth nothing any more, by `time.monotonic`.
        source: what made its token ids; None where it has none.
        steps: where to score on the way; None: at the end only.
        rendezvous: where the models that it asks meet; None where there is one at most.
    """

    samples: tuple[Sample, ...]
    truncation: Truncation
    caller: Caller
    deadline: float
    source: TokenSource | None = None
    steps: Steps | None = None
    rendezvous: Rendezvous[RewardItem, FloatArray] | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """A sequence as text, for rewards that read text."""

    prompt: str
    response: str


def read_text(sample: Sample, codec: Codec | None) -> PlainText:
    """A sample as text; raise InvalidArgument for token ids of a tokenizer that the service does not know."""
    match sample.content:
        case TokenContent(tokens, prompt_length):
            if codec is None:
                raise InvalidArgument("input", "tokens", "texts or conversations: this service has no tokenizer")
            return PlainText(*decode_parts(codec.decode, tokens, (prompt_length, len(tokens))))
        case TextContent(prompt, response):
            return PlainText(prompt, response)
        case ChatContent(turns):
            return PlainText(_lines(turns[:-1]), turns[-1].content)


def read_turns(sample: Sample, codec: Codec | None) -> PlainText:
    """A sample as `read_text` reads it, but a prompt that is a conversation by its turns; raises what that raises."""
    text = read_text(sample, codec)
    match sample.content:
        case TokenContent(_, _, turns) if turns:
            return PlainText(_lines(turns), text.response)
        case _:
            return text


def _lines(turns: Sequence[Turn]) -> str:
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def with_prefixes(samples: Sequence[Sample], steps: Steps | None) -> tuple[Sample, ...]:
    """Every sequence at every position, its whole last: what scores the way by scores of prefixes.

    Raises:
        InvalidArgument: the texts up to each position would fill the memory.
    """
    if steps is None:
        return tuple(samples)
    # Of token ids a prefix is a view.
    characters = sum(
        sum(positions)
        for sample, positions in zip(samples, steps.positions, strict=True)
        if not isinstance(sample.content, TokenContent)
    )
    if characters > _MOST_PREFIX_CHARACTERS:
        expected = f"at most {_MOST_PREFIX_CHARACTERS}: shorter texts, or fewer steps"
        raise InvalidArgument("process", f"{characters} characters in the texts up to each step", expected)
    return tuple(
        sample if position == positions[-1] else sample.prefix(position)
        for sample, positions in zip(samples, steps.positions, strict=True)
        for position in positions
    )


def split_by_steps(values: FloatArray, steps: Steps | None) -> tuple[FloatArray, tuple[FloatArray, ...] | None]:
    """Undo `with_prefixes` on its scores: those of the whole sequences, and those along the way of each."""
    if steps is None:
        return values, None
    ends = np.cumsum([len(positions) for positions in steps.positions])
    way = tuple(np.split(values, ends[:-1]))
    return values[ends - 1], way
