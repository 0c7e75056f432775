"""What comes out of vLLM, as types; imports no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class FlatLogprobs(Protocol):
    """Logprobs of a completion, position by position; the sampled token's comes first at each."""

    logprobs: list[float]


class LabelledTokens(Protocol):
    """Tokens start to end (exclusive) were sampled by the weights with this label."""

    version: str
    start: int
    end: int


class CompletionOutput(Protocol):
    """One completion; `finish_reason` is "stop", "length" or "abort"."""

    token_ids: Sequence[int]
    logprobs: FlatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    weight_versions: Sequence[LabelledTokens] | None


class RequestOutput(Protocol):
    """What a request has come to."""

    outputs: Sequence[CompletionOutput]


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """How a completion ended.

    Attributes:
        output: vLLM's last word on it.
        tokens: how many of its tokens count, where a stop text was found outside of vLLM; else None: all.
    """

    output: CompletionOutput
    tokens: int | None = None
