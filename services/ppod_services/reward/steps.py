"""Where the steps of a response end, in the units that positions have."""

from __future__ import annotations

from dataclasses import dataclass

from ppod.errors import InvalidArgument
from ppod_services.reward.samples import ChatContent, Codec, Granularity, Sample, Steps, TextContent, TokenContent


@dataclass(frozen=True, slots=True)
class StepRule:
    """Where to score.

    Attributes:
        granularity: each step, or response tokens.
        separator: what ends a step.
        interval: response tokens from one to the next.
    """

    granularity: Granularity
    separator: str
    interval: int = 1


def find_steps(samples: tuple[Sample, ...], rule: StepRule, codec: Codec | None, most: int) -> Steps:
    """The positions at which a request is to be scored.

    Args:
        samples: the sequences.
        rule: where.
        codec: of the token ids, where there are any.
        most: most positions in all.

    Raises:
        InvalidArgument: there are more, or tokens were asked for where text came.
    """
    positions = tuple(
        step_positions(sample, rule.separator, codec)
        if rule.granularity is Granularity.STEP
        else token_positions(sample, rule.interval)
        for sample in samples
    )
    count = sum(len(one) for one in positions)
    if count > most:
        raise InvalidArgument("process", f"{count} positions", f"at most {most} in one request")
    return Steps(rule.granularity, positions)


def token_positions(sample: Sample, interval: int = 1) -> tuple[int, ...]:
    """After the first response token, every `interval` further, and the last; InvalidArgument: the sample is text."""
    if not isinstance(sample.content, TokenContent):
        raise InvalidArgument("process", "PROCESS_GRANULARITY_TOKEN", "token ids as input, or granularity STEP")
    whole = len(sample.content.tokens)
    return (*range(sample.content.prompt_length + 1, whole, interval), whole)


def step_positions(sample: Sample, separator: str, codec: Codec | None) -> tuple[int, ...]:
    """After each step; of token ids, after the token that completes the step's text."""
    match sample.content:
        case TextContent(_, response):
            return step_ends(response, separator)
        case ChatContent(turns):
            return step_ends(turns[-1].content, separator)
        case TokenContent(tokens, prompt_length):
            if codec is None:
                raise InvalidArgument("process", "tokens", "texts: this service has no tokenizer to find steps with")
            text = codec.decode(tokens[prompt_length:])
            ends = step_ends(text, separator)
            # The last step ends with the last token, even where that adds no text, as an end of sequence.
            found = {_tokens_up_to(text[:end], sample.content, codec) for end in ends[:-1]} | {len(tokens)}
            return tuple(sorted(found))


def step_ends(text: str, separator: str) -> tuple[int, ...]:
    """Where steps end, in characters; the last one is the text's end.

    A separator ends a step and belongs to it. A step that is blank is none: it joins the next one, or the last.
    """
    ends: list[int] = []
    start = position = 0
    while (found := text.find(separator, position)) >= 0:
        position = found + len(separator)
        if text[start:position].strip():
            ends.append(position)
            start = position
    if ends and not text[start:].strip():
        ends.pop()
    return (*ends, len(text))


def _tokens_up_to(text: str, content: TokenContent, codec: Codec) -> int:
    """How many tokens of the sequence it takes until the response's text begins with this text.

    Not until it is as long: some decoders make several characters of half of one.
    """
    low, high = content.prompt_length + 1, len(content.tokens)
    while low < high:
        middle = (low + high) // 2
        if codec.decode(content.tokens[content.prompt_length : middle]).startswith(text):
            high = middle
        else:
            low = middle + 1
    return low
