"""Conversations as texts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from ppod_models.chat_template import render_chat
from support.tiny_classifiers import chat_tokenizer


def on_day(day: int) -> Callable[[], datetime]:
    return lambda: datetime(2026, 11, day)


def test_a_conversation_is_one_text_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed on the next day has the prompts that it had."""
    tokenizer = chat_tokenizer()
    # As Llama 3.2's; others, as gpt-oss's, do not ask whether they are told the date.
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}{% set today = '' %}"
        "{% endif %}{{ today }}{% for message in messages %}: {{ message.content }}{% endfor %}"
    )
    for day in (27, 28):
        monkeypatch.setattr(chat_template_utils, "datetime", type("Clock", (), {"now": staticmethod(on_day(day))}))
        text = render_chat(tokenizer, [{"role": "user", "content": "hello"}], open_turn=True)
        assert text == "26 Jul 2024: hello"
