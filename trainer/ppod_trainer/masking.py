"""Statistics over the real tokens of padded tensors. Shape legend: B sequences, T response tokens."""

from __future__ import annotations

from typing import Literal

import torch

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over positions where mask [B, T] is true; masked values may be NaN and have no gradient."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over positions where mask is true; zero where none is."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over positions where mask is true; zero where fewer than two are."""
    count = mask.sum()
    centred = values - masked_mean(values, mask)
    return masked_sum(centred.square(), mask) / (count - 1).clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Scale to variance 1 over the mask; `shift_mean=False` keeps the mean, as rewards need. Masked positions are 0.

    In float64: where all values are equal, the mean's rounding in float32 would be scaled to advantages of up to 1.
    """
    exact = values.double()
    mean = masked_mean(exact, mask)
    whitened = (exact - mean) * torch.rsqrt(masked_variance(exact, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened.to(values.dtype), torch.zeros_like(values))


def loss_weights(mask: torch.Tensor, aggregation: Aggregation, constant_tokens: int | None = None) -> torch.Tensor:
    """Weight of each token so that a minibatch's loss is sum(weight * token loss), float32 [B, T].

    token_mean: 1 / (response tokens of the minibatch). sequence_mean: 1 / (sequences * tokens of the sequence).
    constant: 1 / (sequences * constant_tokens), so that neither a sequence's length nor its neighbours' changes
    what its tokens weigh (Liu et al. 2025, "Understanding R1-Zero-Like Training", Dr. GRPO, 3.2).
    The weights are taken over the whole minibatch before it is cut into micro-batches, so that accumulation changes
    nothing. Sequences without a token do not count.

    Raises:
        ValueError: constant without `constant_tokens`.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    if aggregation == "token_mean":
        return mask.float() / lengths.sum().clamp(min=1)
    sequences = (lengths > 0).sum().clamp(min=1)
    if aggregation == "sequence_mean":
        return mask.float() / lengths.clamp(min=1) / sequences
    if constant_tokens is None:
        raise ValueError("aggregation 'constant' needs constant_tokens, such as the longest response's")
    return mask.float() / (sequences * constant_tokens)


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weights * values where the weight is not zero, so that a masked NaN cannot spread."""
    return masked_sum(values * weights, weights > 0)
