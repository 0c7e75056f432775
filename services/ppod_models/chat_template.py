"""Conversations as the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import cast

import jinja2
from transformers import PreTrainedTokenizerFast

_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a template's expressions raise of a conversation that they do not fit, and transformers of an empty one."""

_TODAY = date(2024, 7, 26)
"""What templates are told that write today's date, as Llama's, which take this one where they know none. With the day
that it is, a run that is resumed on another one would have other prompts, and a conversation another score."""


class ChatTemplateError(Exception):
    """A tokenizer has no chat template, or the template refuses a conversation."""


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], *, open_turn: bool) -> str:
    """Apply the chat template; special tokens are in the text, which is the same on any day.

    Args:
        tokenizer: whose template.
        messages: each with `role` and `content`.
        open_turn: begin the assistant's turn behind them.

    Raises:
        ChatTemplateError: it cannot.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError("its tokenizer has no chat template")
    turns = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=open_turn, strftime_now=_TODAY.strftime
        )
    except _TEMPLATE_ERRORS as error:
        raise ChatTemplateError(f"its chat template refuses the conversation: {error}") from error
    return cast(str, text)


def turn_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """What the chat template puts behind an assistant's answer. Raises ChatTemplateError as `render_chat`."""
    answer = "forty-two"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
    return render_chat(tokenizer, turns, open_turn=False).rpartition(answer)[2]


def turn_end_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token with which the chat template ends an assistant's answer; None where none does."""
    try:
        ids = tokenizer.encode(turn_end(tokenizer), add_special_tokens=False)
    except ChatTemplateError:
        return None
    # A token of text would be taken for a part of the answer.
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
