"""Completions, recomputed by full forwards without padding and without cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ppod.client import Completion
from support.sampling_reference import Rules, reference_distribution


@torch.no_grad()
def next_logits(model: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, V] that each token was drawn from, float64."""
    ids = [*prompt, *tokens]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(ids) - 1].double()


def distributions(
    model: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int], rules: Rules
) -> list[npt.NDArray[np.float64]]:
    """The distribution [V] that each token was drawn from."""
    logits = next_logits(model, prompt, tokens).numpy()
    return [reference_distribution(row, rules, [*prompt, *tokens[:at]]) for at, row in enumerate(logits)]


def chosen_logprobs(rows: Sequence[npt.NDArray[np.float64]], tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """The logprob of each token."""
    return np.log([row[token] for row, token in zip(rows, tokens, strict=True)])


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    """Their tokens."""
    return [done.token_ids.tolist() for done in completions]
