"""How a conversation's template ends a turn, and what follows from it: what ends sampling, and what rewards read."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerFast

from ppod_models.chat_template import ChatTemplateError, turn_end, turn_end_token
from ppod_trainer.config import RolloutConfig
from ppod_trainer.prompts import PromptSet

log = logging.getLogger(__name__)

_ALL_TOKENS = range(2**31)


def read_stop_tokens(
    mode: Literal["auto", "read", "hide"], prompts: PromptSet, tokenizer: PreTrainedTokenizerFast
) -> Container[int]:
    """The stop tokens that rewards read at the end of a response, as `rewards.stop_token` says."""
    match mode:
        case "read":
            return _ALL_TOKENS
        case "hide":
            return ()
        case "auto":
            end = turn_end_token(tokenizer) if prompts.conversations else None
            return () if end is None else (end,)


def warn_of_endless_turns(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerFast, eos_token_ids: Sequence[int], rollout: RolloutConfig
) -> None:
    """Base models may have a chat template whose end of a turn does not end their sampling."""
    if not prompts.conversations:
        return
    try:
        end = turn_end(tokenizer)
    except ChatTemplateError:
        # Of this conversation; those of the prompts were rendered.
        return
    ids = tokenizer.encode(end, add_special_tokens=False)
    stop_token_ids = (*eos_token_ids, *rollout.stop_token_ids)
    if not ids or ids[0] in stop_token_ids or any(text in end for text in rollout.stop):
        return
    # A token of text may stand anywhere in a response.
    own = ids[0] in tokenizer.added_tokens_decoder
    log.warning(
        "the chat template ends the assistant's turn with %r, which is none of generation's stop tokens (%s): "
        "responses run on to rollout.max_tokens; set rollout.%s",
        end,
        ", ".join(map(str, stop_token_ids)) or "none",
        f"stop_token_ids to [{ids[0]}]" if own else f"stop to [{json.dumps(end)}]",
    )
