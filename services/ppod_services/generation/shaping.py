"""What is done to one row's logits before they are drawn from: logit bias, then repetition penalty.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from ppod.tensors import TokenArray
from ppod_services.generation.requests import TokenFilter


class LogitShape:
    """The penalty and the bias of one completion, which remembers the tokens that it holds.

    Args:
        token_filter: how its tokens are drawn.
        prompt: int32 [length].
        max_tokens: most tokens that will be added.
        device: of the logits.
    """

    def __init__(self, token_filter: TokenFilter, prompt: TokenArray, max_tokens: int, device: torch.device) -> None:
        self._penalty = token_filter.repetition_penalty
        self._held: set[int] = set(prompt.tolist()) if self._penalty != 1.0 else set()
        self._ids = np.zeros(len(self._held) + max_tokens, dtype=np.int64)
        self._ids[: len(self._held)] = sorted(self._held)
        bias = token_filter.logit_bias
        self._bias_ids = torch.tensor([token for token, _ in bias], dtype=torch.int64, device=device)
        self._bias = torch.tensor([value for _, value in bias], dtype=torch.float32, device=device)

    @staticmethod
    def of(token_filter: TokenFilter, prompt: TokenArray, max_tokens: int, device: torch.device) -> LogitShape | None:
        """The shape that a filter asks for; None where it leaves logits as they are."""
        plain = token_filter.repetition_penalty == 1.0 and not token_filter.logit_bias
        return None if plain else LogitShape(token_filter, prompt, max_tokens, device)

    def add(self, token: int) -> None:
        """The completion goes on with this token."""
        if self._penalty != 1.0 and token not in self._held:
            self._ids[len(self._held)] = token
            self._held.add(token)

    def apply(self, logits: torch.Tensor) -> None:
        """Change float32 logits [V] in place."""
        if len(self._bias_ids):
            logits.index_add_(0, self._bias_ids, self._bias)
        if self._held:
            ids = torch.from_numpy(self._ids[: len(self._held)]).to(logits.device)
            held = logits[ids]
            logits[ids] = torch.where(held > 0, held / self._penalty, held * self._penalty)
