"""Drawing of tokens from logits: inverse CDF, one uniform a token, with the logprob under that very distribution.

Shape legend: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ppod_services.generation.requests import TokenFilter

_BLOCK = 256
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each row.

    Attributes:
        tokens: int64 [B].
        logprobs: float64 [B], natural log, under the distribution that the token was drawn from; greedy rows: under
            the untempered, uncut one. NaN or infinite in rows whose logits are not finite.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor


def draw(logits: torch.Tensor, filters: Sequence[TokenFilter], uniforms: torch.Tensor) -> Drawn:
    """Draw one token for each row; each row's result depends on its own values alone.

    Args:
        logits: float32 [B, V]; overwritten.
        filters: B of them.
        uniforms: float64 [B] in [0, 1).
    """
    best = logits.argmax(dim=-1) if any(row.greedy for row in filters) else None
    # Before the division: of the smallest temperatures the likeliest token's own logit would overflow.
    logits -= logits.amax(dim=-1, keepdim=True)
    if any(row.temperature not in (0.0, 1.0) for row in filters):
        divisors = [row.temperature or 1.0 for row in filters]
        logits /= torch.tensor(divisors, device=logits.device).unsqueeze(-1)
    weights = _softmax_weights(logits)
    block_ends = weights.sum(dim=-1).double().cumsum(dim=-1)
    vocabulary = logits.shape[1]
    totals = block_ends[:, -1]
    tokens = _invert(weights, block_ends, uniforms)
    if best is not None:
        greedy = torch.tensor([row.greedy for row in filters], device=logits.device)
        tokens = torch.where(greedy, best, tokens)
    flat = weights.flatten(1)
    logprobs = (flat.gather(1, tokens.unsqueeze(-1)).squeeze(-1).double() / totals).log()
    cut = [row for row, kept in enumerate(filters) if kept.cuts]
    if cut:
        rows = torch.tensor(cut, device=logits.device)
        drawn = _draw_cut(flat[rows, :vocabulary], totals[rows], [filters[row] for row in cut], uniforms[rows])
        tokens[rows] = drawn.tokens
        logprobs[rows] = drawn.logprobs
    return Drawn(tokens, logprobs)


def _softmax_weights(logits: torch.Tensor) -> torch.Tensor:
    """exp of logits whose maximum is 0, float32 [B, blocks, _BLOCK]; what rounds V up to whole blocks is zero.

    In place where V is a multiple of _BLOCK: fresh megabytes at each step cost more than the arithmetic on them.
    """
    rows, vocabulary = logits.shape
    logits.exp_()
    blocks = -(-vocabulary // _BLOCK)
    padded = nn.functional.pad(logits, (0, blocks * _BLOCK - vocabulary)) if vocabulary % _BLOCK else logits
    return padded.view(rows, blocks, _BLOCK)


def _invert(weights: torch.Tensor, block_ends: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First token whose cumulative weight exceeds uniform * total; int64 [B].

    Two levels, blocks and then tokens: a float64 running sum over the whole vocabulary is the slowest part of a draw,
    and a float32 one loses the tail.
    """
    totals = block_ends[:, -1:]
    last = torch.nextafter(totals, torch.zeros_like(totals))
    targets = torch.minimum(uniforms.unsqueeze(-1) * totals, last)
    block = torch.searchsorted(block_ends, targets, right=True).clamp_(max=block_ends.shape[1] - 1)
    starts = torch.where(block > 0, block_ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1).double()
    return block.squeeze(-1) * _BLOCK + _first_beyond(inside, targets - starts)


def _first_beyond(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Index of the first positive weight whose running sum exceeds the target; int64 [B] for [B, K] and [B, 1]."""
    found = torch.searchsorted(weights.cumsum(dim=-1), targets, right=True).squeeze(-1)
    # The sum of the parts may end a rounding error below the target: then the last token with any weight is meant.
    indices = torch.arange(weights.shape[1], device=weights.device)
    last_positive = torch.where(weights > 0, indices, 0).amax(dim=-1)
    return torch.minimum(found, last_positive)


def _draw_cut(
    weights: torch.Tensor, totals: torch.Tensor, filters: Sequence[TokenFilter], uniforms: torch.Tensor
) -> Drawn:
    """Draw where min-p, then top-k, then top-p over what they left, cut [B, V] and it is renormalised."""
    vocabulary = weights.shape[1]
    if any(row.min_p > 0 for row in filters):
        # The likeliest token weighs exp(0), so weights are already relative to it.
        least = torch.tensor([row.min_p for row in filters], dtype=weights.dtype, device=weights.device).unsqueeze(-1)
        weights = torch.where(weights >= least, weights, 0.0)
        # What was not finite must show further on: a comparison would have hidden it. Other rows keep theirs.
        thinned = totals.isfinite() & (least.squeeze(-1) > 0)
        totals = torch.where(thinned, weights.sum(dim=-1, dtype=torch.float64), totals)
    most = [min(row.top_k, vocabulary) or vocabulary for row in filters]
    top_k = torch.tensor(most, device=weights.device).unsqueeze(-1)
    top_p = torch.tensor([row.top_p for row in filters], dtype=torch.float64, device=weights.device).unsqueeze(-1)
    count = min(vocabulary, max(_FIRST_CANDIDATES, *(row.top_k for row in filters)))
    while True:
        sorted_weights = weights.topk(count, dim=-1).values
        candidates = sorted_weights.double()
        candidates *= torch.arange(count, device=weights.device) < top_k
        ends = candidates.cumsum(dim=-1)
        # All k candidates are at hand where top-k cuts; elsewhere top-p is of the whole distribution,
        # and of the same sum of it however many candidates other rows ask for.
        mass = torch.where(top_k < vocabulary, ends[:, -1:], totals.unsqueeze(-1))
        kept = (ends - candidates) < top_p * mass
        # A row that is not finite has no end, and must not keep the others from theirs.
        complete = ~kept[:, -1] | (top_k.squeeze(-1) <= count) | ~totals.isfinite()
        if count == vocabulary or bool(complete.all()):
            break
        count = min(vocabulary, count * 4)
    candidates *= kept
    kept_total = candidates.sum(dim=-1, keepdim=True)
    chosen = _first_beyond(candidates, uniforms.unsqueeze(-1) * kept_total).unsqueeze(-1)
    logprobs = (candidates.gather(1, chosen) / kept_total).log().squeeze(-1)
    return Drawn(_nth_largest(weights, sorted_weights, chosen), logprobs)


def _nth_largest(weights: torch.Tensor, sorted_weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The token at a place of each row's order, equal weights in the order of their ids; int64 [B] for places [B, 1].

    topk puts equal weights, of which 16-bit models have many, into an order that depends on how many are asked for, and
    so on the other rows.
    """
    weight = sorted_weights.gather(1, places)
    among_equals = (places - (weights > weight).sum(dim=-1, keepdim=True)).squeeze(-1)
    equal = weights == weight
    ends = equal.sum(dim=-1).cumsum(dim=0)
    starts = nn.functional.pad(ends[:-1], (1, 0))
    # Row after row. One that is not finite has none, and gets any: it fails.
    ids = nn.functional.pad(equal.nonzero()[:, 1], (0, 1))
    return ids[(starts + among_equals).clamp(min=0, max=len(ids) - 1)]
