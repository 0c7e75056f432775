"""Attention of sequences that decode: one query for each, keys and values in slots.

Models with grouped-query attention have several query heads for each key head. transformers repeats the keys for each
of them, which copies all that was ever cached, at every token. Here the heads of a group are the queries of one
attention instead: nothing is copied.

Shape legend: B sequences, A query heads, K key-value heads, G = A / K heads of a group, T keys, Q queries, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_NAMES = {"sdpa": "ppod_slots_sdpa", "eager": "ppod_slots_eager"}
_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some models ask of their attention, and this one does not do."""


def use_grouped_attention(model: PreTrainedModel) -> str:
    """Let a model attend by groups; returns the name of the attention that it had."""
    before = str(model.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
    if before in _NAMES:
        model.set_attn_implementation(_NAMES[before])
    return before


def _grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query [B, A, Q, D] to [B, Q, A, D]; by torch's fused kernels."""
    _check(options)
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    attended = nn.functional.scaled_dot_product_attention(
        _by_group(query, key), key, value, attn_mask=attention_mask, scale=scaling
    )
    return attended.reshape(query.shape[0], 1, query.shape[1], value.shape[3]), None


def _grouped_eager(
    module: nn.Module,  # noqa: ARG001 - transformers' signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As `_grouped_sdpa`, by two matrix products and a softmax in float32."""
    _check(options)
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    scores = torch.matmul(_by_group(query, key), key.transpose(2, 3))
    scores *= size**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        scores = (scores.unflatten(2, (groups, queries)) + attention_mask.unsqueeze(1)).flatten(2, 3)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attended = torch.matmul(weights, value).unflatten(2, (groups, queries))
    return attended.permute(0, 3, 1, 2, 4).reshape(rows, queries, heads, value.shape[3]), None


def _by_group(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, A, Q, D] as [B, K, G * Q, D]; neighbours share a key head."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def _check(options: dict[str, Any]) -> None:
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise ValueError(f"grouped attention knows no {name}")


AttentionInterface.register(_NAMES["sdpa"], _grouped_sdpa)
AttentionInterface.register(_NAMES["eager"], _grouped_eager)
AttentionMaskInterface.register(_NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(_NAMES["eager"], eager_mask)
