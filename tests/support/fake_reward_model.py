"""Stands in for `ppod_models.reward_model` where a test needs scores that are known by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAN_TOKEN = 259
MAX_TOKENS = 20


class RewardHeadError(Exception):
    """A head is missing."""


class RewardModel:
    """Scores a sequence with factor * (sum of ids) + length; a sequence that holds NAN_TOKEN gets NaN."""

    def __init__(self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, factor: float) -> None:
        self.trunk = trunk
        self.tokenizer = tokenizer
        self.max_sequence_tokens = MAX_TOKENS
        self._factor = factor

    @classmethod
    def load(cls, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, head: str | Path) -> RewardModel:
        if str(head) == "missing":
            raise RewardHeadError("no head 'missing'")
        return cls(trunk, tokenizer, float(head))

    def score(self, sequences: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.float32]:
        values = [
            np.nan if NAN_TOKEN in tokens.tolist() else self._factor * int(tokens.sum()) + len(tokens)
            for tokens in sequences
        ]
        return np.asarray(values, dtype=np.float32)
