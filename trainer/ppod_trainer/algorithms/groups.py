"""Statistics over the samples of one prompt.

Shape legend: B sequences, T response tokens.

A group is what is left of it: samples that were dropped do not count. All is computed in float64, and a group whose
samples were all paid the same is known by its extremes, as close as float32 has them where one was paid in parts:
rounding would leave a deviation that is not 0, and dividing by it would turn noise into advantages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.rounding import ROUNDING


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What a sample's group says, for each sample.

    Attributes:
        size: int64 [B], samples in the group, the sample itself included.
        total: float64 [B], sum over the group.
        mean: float64 [B]; in a uniform group exactly the sample's own value.
        std: float64 [B], unbiased (divided by size - 1); 0 in a group of one.
        uniform: bool [B]; all of the group have the same value but for rounding, as a group of one has.
    """

    size: torch.Tensor
    total: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    uniform: torch.Tensor


def group_statistics(values: torch.Tensor, groups: torch.Tensor) -> GroupStatistics:
    """Statistics of values [B] over the groups, int64 [B]."""
    _, member = torch.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    exact = values.double()

    def reduce(what: torch.Tensor, how: str) -> torch.Tensor:
        empty = torch.zeros(count, dtype=torch.float64, device=values.device)
        return empty.scatter_reduce(0, member, what, how, include_self=False)[member]

    size = torch.bincount(member, minlength=count)[member]
    total = reduce(exact, "sum")
    most, least = reduce(exact, "amax"), reduce(exact, "amin")
    uniform = most - least <= ROUNDING * torch.maximum(most, -least)
    mean = torch.where(uniform, exact, total / size)
    squares = reduce((exact - mean).square(), "sum")
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return GroupStatistics(size, total, mean, std, uniform)


def for_tokens(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One advantage a response, [B], for each of its action tokens: float32 [B, T], 0 where mask is false."""
    return torch.where(mask, advantages.float().unsqueeze(1), 0.0)
