"""How a conversation's template ends a turn: what is told of it, and which stop tokens rewards read."""

from __future__ import annotations

from typing import Literal

import pytest

from ppod_trainer.config import RolloutConfig
from ppod_trainer.prompts import PromptSet
from ppod_trainer.turn_ends import read_stop_tokens, warn_of_endless_turns
from support.tiny_model import build_tokenizer


@pytest.mark.parametrize(
    ("ending", "conversations", "stops", "told"),
    [
        ("{{ eos_token }}\n", True, {}, None),
        ("|\n", True, {}, 'stop to ["|\\n"]'),
        ("{{ pad_token }}\n", True, {"stop_token_ids": [7]}, "stop_token_ids to [257]"),
        ("{{ pad_token }}\n", True, {"stop_token_ids": [7, 257]}, None),
        ("|\n", True, {"stop": ["x", "|"]}, None),
        ("|\n", False, {}, None),
        # What ends a turn is then the policy's to know.
        ("", True, {}, None),
        ("{{ raise_exception('no answers') }}", True, {}, None),
    ],
)
def test_a_template_whose_turns_do_not_end_is_told(
    caplog: pytest.LogCaptureFixture, ending: str, conversations: bool, stops: dict[str, object], told: str | None
) -> None:
    tokenizer = build_tokenizer()
    turn = f"{{% if message.role == 'assistant' %}}{ending}{{% endif %}}"
    tokenizer.chat_template = f"{{% for message in messages %}}{{{{ message.content }}}}{turn}{{% endfor %}}"
    eos = (3, int(tokenizer.eos_token_id or 0))
    rollout = RolloutConfig.model_validate(stops)
    warn_of_endless_turns(PromptSet([], [], conversations=conversations), tokenizer, eos, rollout)
    lines = [record.getMessage() for record in caplog.records]
    known = ", ".join(map(str, (*eos, *rollout.stop_token_ids)))
    assert [line.endswith(f"set rollout.{told}") for line in lines] == [True] * (told is not None)
    assert all(f"which is none of generation's stop tokens ({known}): " in line for line in lines)


@pytest.mark.parametrize(
    ("mode", "ending", "conversations", "read"),
    [
        ("auto", "{{ pad_token }}\n", True, {257}),
        # A text is read as its reader sees it, whatever ends it.
        ("auto", "{{ pad_token }}\n", False, set[int]()),
        # A word that a template ends a turn with may be the answer's.
        ("auto", "|\n", True, set[int]()),
        ("auto", "", True, set[int]()),
        ("auto", "{{ raise_exception('no answers') }}", True, set[int]()),
        ("read", "|\n", False, {124, 256, 257}),
        ("hide", "{{ pad_token }}\n", True, set[int]()),
    ],
)
def test_rewards_read_the_stop_token_that_is_asked_for(
    mode: Literal["auto", "read", "hide"], ending: str, conversations: bool, read: set[int]
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = f"{{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}{ending}"
    found = read_stop_tokens(mode, PromptSet([], [], conversations=conversations), tokenizer)
    assert {token for token in (124, 256, 257) if token in found} == read
