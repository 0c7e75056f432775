"""Turns of token tensors. Shape legend: B sequences, T response tokens, K turns, H hidden size."""

from __future__ import annotations

import torch


def sum_by_turn(values: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Sums of values [B, T] over each turn (int64 [B, T], -1 where none): same dtype, [B, K]; 0 for turns not there."""
    here = turns >= 0
    sums = torch.zeros(len(values), max(int(turns.max()) + 1, 1), dtype=values.dtype, device=values.device)
    return sums.scatter_add(1, turns.clamp(min=0), torch.where(here, values, torch.zeros_like(values)))


def last_tokens(turns: torch.Tensor) -> torch.Tensor:
    """Position of each turn's last token, int64 [B, K]; -1 for turns that are not there."""
    positions = torch.arange(turns.shape[1], device=turns.device).expand_as(turns)
    last = torch.full((len(turns), max(int(turns.max()) + 1, 1)), -1, dtype=torch.int64, device=turns.device)
    there = torch.where(turns >= 0, positions, -1)
    return last.scatter_reduce(1, turns.clamp(min=0), there, "amax")


def spread(values: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Values of turns, [B, K], on each of their tokens: [B, T], 0 where there is none."""
    on_tokens = values.gather(1, turns.clamp(min=0))
    return torch.where(turns >= 0, on_tokens, torch.zeros_like(on_tokens))


def states_at(states: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Of states [B, T, H] those at positions [B, K], as of `last_tokens`: [B, K, H]; 0 where there is none."""
    at = last.clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return torch.where(last.unsqueeze(-1) >= 0, states.gather(1, at), torch.zeros_like(states[:1, :1]))
