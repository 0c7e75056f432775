"""Files of prompts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import cast

from ppod.client import ChatTurn
from ppod_models.chat_template import ChatTemplateError
from ppod_trainer.errors import PromptError

Render = Callable[[Sequence[Mapping[str, str]]], str]
"""Makes a text of a conversation, with the assistant's turn begun; raises ChatTemplateError."""

_TOOLS = ("tools", "tool_calls")
"""Of a line and of a message: without them a conversation would be another one."""


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt as text, special tokens in it; what responses are checked against, if anything; and its turns.

    A conversation has some. It is whole: cut anywhere it would not be one that the policy knows.
    """

    text: str
    reference: str | None = None
    turns: tuple[ChatTurn, ...] = ()


def read_prompts(path: Path | None, render: Render) -> list[PromptText]:
    """All prompts of a file of a kind that the configuration takes; either all have a reference or none has.

    Raises:
        PromptError: the file is missing or malformed, or the policy's chat template refuses a conversation.
    """
    if path is None:
        path = Path(str(files("ppod_trainer") / "data" / "movie_review_ratings.tsv"))
    readers = {".tsv": _read_tsv, ".jsonl": _read_jsonl, ".txt": _read_lines}
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompts.path {path}: cannot be read: {error}") from error
    return readers[path.suffix](path, content, render)


def _read_tsv(path: Path, content: str, render: Render) -> list[PromptText]:
    del render
    rows = csv.DictReader(_lines(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        return _read_rows(path, rows)
    except csv.Error as error:
        raise PromptError(
            f"prompts.path {path}, line {rows.reader.line_num}: {error}; a .jsonl takes longer texts"
        ) from error


def _read_rows(path: Path, rows: csv.DictReader[str]) -> list[PromptText]:
    if "text" not in (rows.fieldnames or []):
        raise PromptError(f"prompts.path {path}: the header has {rows.fieldnames}; expected a column `text`")
    prompts: list[PromptText] = []
    for row in rows:
        reference: str | None = row.get("reference")
        if reference is None and "reference" in row:
            raise PromptError(f"prompts.path {path}, line {rows.line_num}: it ends before the column `reference`")
        prompts.append(PromptText(str(row["text"] or ""), reference))
    return prompts


def _read_jsonl(path: Path, content: str, render: Render) -> list[PromptText]:
    prompts: list[PromptText] = []
    for number, line in enumerate(_lines(content), start=1):
        where = f"prompts.path {path}, line {number}"
        try:
            record: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Python takes no integers of more than 4300 digits.
            raise PromptError(f"{where}: not JSON: {error}") from error
        prompt = _read_record(record, render, where) if isinstance(record, dict) else None
        if prompt is None:
            found = f"found {line[:60]!r}, expected a string `prompt`, or `messages`, each with `role` and `content`"
            raise PromptError(f"{where}: {found}")
        if prompts and (prompt.reference is None) != (prompts[0].reference is None):
            raise PromptError(f"{where}: `reference` belongs to all lines or to none, and line 1 differs")
        prompts.append(prompt)
    return prompts


def _read_record(record: Mapping[str, object], render: Render, where: str) -> PromptText | None:
    """None where it is no prompt."""
    text, messages, reference = (record.get(key) for key in ("prompt", "messages", "reference"))
    if not (reference is None or isinstance(reference, str)):
        raise PromptError(f"{where}: reference: found {reference!r}, expected a string")
    if messages is None:
        return PromptText(text, reference) if isinstance(text, str) else None
    if text is not None or not isinstance(messages, list):
        return None
    given = cast("list[object]", messages)
    for key in _TOOLS:
        if any(cast("dict[str, object]", one).get(key) for one in (record, *given) if isinstance(one, dict)):
            raise PromptError(f"{where}: {key}: only `role` and `content` reach the chat template; leave the line out")
    read = [_read_turn(message) for message in given]
    turns = [turn for turn in read if turn is not None]
    if not turns or len(turns) < len(read):
        return None
    if turns[-1]["role"] == "assistant":
        # As in data for supervised training. The policy would read there what it is to say.
        raise PromptError(f"{where}: messages: the last is the assistant's; end with what the policy is to answer")
    try:
        return PromptText(render(turns), reference, tuple(ChatTurn(**turn) for turn in turns))
    except ChatTemplateError as error:
        raise PromptError(f"{where}: messages: the policy cannot be asked so: {error}") from error


def _read_turn(message: object) -> dict[str, str] | None:
    if not isinstance(message, dict):
        return None
    given = cast("dict[str, object]", message)
    role, content = given.get("role"), given.get("content")
    return {"role": role, "content": content} if isinstance(role, str) and role and isinstance(content, str) else None


def _read_lines(path: Path, content: str, render: Render) -> list[PromptText]:
    del path, render
    return [PromptText(line) for line in _lines(content)]


def _lines(content: str) -> list[str]:
    """Unlike `str.splitlines`, which also cuts where a text holds a form feed, or a separator of paragraphs."""
    return content.removesuffix("\n").split("\n") if content else []
