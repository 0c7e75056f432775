"""Ragged token sequences as padded tensors.

Shape legend: B sequences, T padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Padded sequences.

    Attributes:
        input_ids: int64 [B, T]; padding holds 0, a valid id that the mask hides. It is never read as "eos".
        attention_mask: int64 [B, T]; 1 on real tokens.
        position_ids: int64 [B, T]; cumsum(mask) - 1 on real tokens, 0 on left padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def pad_sequences(
    sequences: Sequence[npt.NDArray[np.integer]], *, side: Literal["left", "right"], device: torch.device
) -> PaddedBatch:
    """Pad int arrays of shape [length] to the longest of them, on the side asked for."""
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, span] = sequence
        mask[row, span] = 1
    attention_mask = torch.from_numpy(mask).to(device)
    return PaddedBatch(torch.from_numpy(ids).to(device), attention_mask, position_ids(attention_mask))


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only: cumsum(mask) - 1, floored at 0. int64 [B, T] for a mask [B, T]."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
