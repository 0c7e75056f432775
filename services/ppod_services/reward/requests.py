"""What passes between the reward servicer and its engine. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ppod.tensors import TokenArray
from ppod_services.core.described import ModelInfo


@dataclass(frozen=True, slots=True, eq=False)
class RewardItem:
    """One sequence to score: position in its request, name of the model, int32 [length]."""

    sample: int
    model: str
    tokens: TokenArray


class TextEncoder(Protocol):
    """Turns texts into token ids; safe to call beside the model's thread."""

    def __call__(self, texts: list[str]) -> list[TokenArray]:
        """One int32 array a text, without special tokens; empty where a text has no token."""
        ...


@dataclass(frozen=True, slots=True)
class RewardTarget:
    """One loaded reward model as the servicer sees it."""

    info: ModelInfo
    encode: TextEncoder
