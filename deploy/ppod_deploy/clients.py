"""`ppod score` and `ppod generate`: one request from the command line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from ppod.client import ClientSecurity, Completion, GenerationClient, Pin, RewardClient, Sampling, Truncation
from ppod.client.texts import check_texts
from ppod_models.decoding import decode_parts
from ppod_models.sources import resolve_tokenizer


@dataclass(frozen=True, slots=True)
class ScoreQuery:
    """What to score.

    Attributes:
        target: `host:port` of a reward service; several with commas between share the work.
        texts: at least one.
        model: name of the reward model; empty: the service's first.
        as_json: print one JSON object a line, not a table.
        timeout_s: deadline in seconds.
        security: TLS and token.
    """

    target: str
    texts: Sequence[str]
    model: str
    as_json: bool
    timeout_s: float
    security: ClientSecurity


@dataclass(frozen=True, slots=True)
class GenerateQuery:
    """What to generate.

    Attributes:
        target: `host:port` of a generation service.
        prompts: at least one.
        tokenizer: model source whose tokenizer.json the service's model uses.
        sampling: how tokens are drawn.
        seed: of the first completion, the next has the next; None: the service picks.
        as_json: print one JSON object a line.
        timeout_s: deadline in seconds.
        security: TLS and token.
    """

    target: str
    prompts: Sequence[str]
    tokenizer: str
    sampling: Sampling
    seed: int | None
    as_json: bool
    timeout_s: float
    security: ClientSecurity


def score(query: ScoreQuery) -> None:
    """Score texts and print a score for each.

    Raises:
        PpodError: the service answered with an error, or not at all.
    """
    pin = Pin(model=query.model)
    with RewardClient(query.target, timeout_s=query.timeout_s, pin=pin, security=query.security) as client:
        scores = client.score_texts(query.texts, truncation=Truncation.RIGHT)
    rows = list(zip(query.texts, scores.values.tolist(), scores.truncated_tokens, strict=True))
    if query.as_json:
        for text, value, truncated in rows:
            print_json({"text": text, "score": value, "truncated_tokens": truncated, "model": scores.state.model})
        return
    table = Table("score", "text", title=f"{scores.state.model}, weights {scores.state.weight_version}")
    table.columns[0].justify = "right"
    for text, value, truncated in rows:
        note = f" (last {truncated} tokens dropped)" if truncated else ""
        table.add_row(f"{value:+.3f}", Text.assemble(text, (note, "dim")))
    Console().print(table)


def generate(query: GenerateQuery) -> None:
    """Complete prompts and print each completion.

    Raises:
        PpodError: the service answered with an error, or not at all. ModelSourceError: there is no such tokenizer.
    """
    check_texts("prompts", query.prompts)
    # The tokenizer file alone, through the tokenizers library: no torch, so the command answers at once.
    tokenizer = Tokenizer.from_file(str(resolve_tokenizer(query.tokenizer) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = [tokenizer.encode(prompt).ids for prompt in query.prompts]
    count = len(ids) * max(query.sampling.n, 1)
    seeds = [] if query.seed is None else [query.seed + index for index in range(count)]
    with GenerationClient(query.target, timeout_s=query.timeout_s, security=query.security) as client:
        _tell_other_tokenizer(query.tokenizer, tokenizer, client.describe().state.tokenizer_fingerprint)
        completions = client.generate(ids, query.sampling, seeds=seeds)
    for completion in completions:
        prompt, begin = query.prompts[completion.index], len(ids[completion.index])
        tokens = np.array([*ids[completion.index], *completion.token_ids], dtype=np.int32)
        _, text = decode_parts(lambda part: tokenizer.decode(part.tolist()), tokens, (begin, len(tokens)))
        if query.as_json:
            print_json(_record(prompt, text, completion))
        else:
            print_completion(prompt, text, completion.filter_reason)


def _tell_other_tokenizer(source: str, tokenizer: Tokenizer, served: str) -> None:
    """Say on stderr that the ids may stand for other text to the service's model.

    No error: the service may read the same file into another tokenizer, as transformers does for some models.
    """
    found = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    if served not in ("", found):
        print(
            f"ppod: note: the tokenizer of {source} is not the service's (fingerprint {found}, not {served}): prompts "
            "and completions may be other text than is shown; --tokenizer names the model that is served",
            file=sys.stderr,
        )


def print_completion(prompt: str, text: str, withheld: str) -> None:
    """Show a completion behind its prompt, exactly as it is and without line breaks; or why it is withheld."""
    shown = (f" (withheld: {withheld})", "dim") if withheld else text
    # As text, not markup: brackets and colons are the model's.
    Console(highlight=False).print(Text.assemble((prompt, "dim"), shown), soft_wrap=True)


def read_lines(texts: Sequence[str]) -> list[str]:
    """The texts, or the non-empty lines of stdin where there are none."""
    # Standard input, unlike a file, keeps the carriage return of Windows' lines.
    return list(texts) or [line.removesuffix("\n").removesuffix("\r") for line in sys.stdin if line.strip()]


def print_json(record: dict[str, str | int | float | list[float]]) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(record, ensure_ascii=False))


def _record(prompt: str, text: str, completion: Completion) -> dict[str, str | int | float | list[float]]:
    return {
        "prompt": prompt,
        "completion": text,
        "finish_reason": completion.finish_reason.name.lower(),
        "logprobs": [round(value, 6) for value in completion.logprobs.tolist()],
        "seed": completion.seed,
        "model": completion.state.model,
        "weight_version": completion.state.weight_version,
    }
