"""Logprobs of given tokens, computed the same way wherever ppod needs them.

The vocabulary makes logits by far the largest tensors of an RLHF step. Nothing here holds them for more than
`CHUNK_POSITIONS` positions at a time: the backward pass makes them again from hidden states, which costs one more
matrix product and saves gigabytes. Only those of the forward pass's last chunk are kept, for the backward pass begins
with them: where all positions are one chunk nothing is computed twice.

Shape legend: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ppod_models.logit_transforms import UNCHANGED, LogitTransform

CHUNK_POSITIONS = 256
"""Positions whose logits exist at a time: bounds the float32 [positions, V] tensor to 50 MB at V = 49,152."""

_ENTROPY_ROWS = 64


class TokenLogprobs(NamedTuple):
    """Of each position: logprob of its token in natural log, and entropy in nats. Both float32 [N]."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def token_logprobs(
    hidden: torch.Tensor,
    head: nn.Module,
    tokens: torch.Tensor,
    temperature: float,
    *,
    entropy: bool = True,
    transform: LogitTransform = UNCHANGED,
) -> TokenLogprobs:
    """Logprobs of tokens, and entropies, under softmax(transform(head(hidden)) / temperature).

    The matrix products run in the dtype of `hidden`, the softmax in float32. Both results carry gradients to `hidden`
    and to the head.

    Args:
        hidden: [N, H] of any float dtype.
        head: the language model's output layer: linear, weight [V, H], with or without a bias [V].
        tokens: int64 [N].
        temperature: > 0.
        entropy: whether the entropy is wanted; without it zeros are returned.
        transform: what the model does to its logits after the output layer.
    """
    linear = cast(nn.Linear, head)
    softmax = _Softmax.of(temperature, transform)
    logprobs, entropies = cast(
        tuple[torch.Tensor, torch.Tensor],
        _TokenLogprobs.apply(hidden, linear.weight, linear.bias, tokens, softmax, entropy),
    )
    return TokenLogprobs(logprobs, entropies)


class TokenDistributions(NamedTuple):
    """Of each position, under softmax(transform(head(hidden)) / temperature).

    Attributes:
        logprobs: float32 [N], of the position's token, natural log.
        entropies: float32 [N] in nats; None unless asked for.
        top_ids: int64 [N, K], the K most probable tokens, the most probable first.
        top_logprobs: float32 [N, K], theirs.
    """

    logprobs: torch.Tensor
    entropies: torch.Tensor | None
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


@torch.inference_mode()
def token_distributions(
    hidden: torch.Tensor,
    head: nn.Module,
    tokens: torch.Tensor,
    temperature: float,
    *,
    entropy: bool,
    top_k: int,
    transform: LogitTransform = UNCHANGED,
) -> TokenDistributions:
    """What a reference tells of each position, without gradients; `logprobs` are those of `token_logprobs`, to the bit.

    Args:
        hidden: [N, H] of any float dtype.
        head: the language model's output layer.
        tokens: int64 [N].
        temperature: > 0.
        entropy: whether entropies are wanted.
        top_k: K, 0 to V.
        transform: what the model does to its logits after the output layer.
    """
    linear, softmax = cast(nn.Linear, head), _Softmax.of(temperature, transform)
    weight = linear.weight.to(hidden.dtype)
    logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropies = torch.empty_like(logprobs) if entropy else None
    top_ids = torch.empty(len(hidden), top_k, dtype=torch.int64, device=hidden.device)
    top_logprobs = torch.empty(len(hidden), top_k, dtype=torch.float32, device=hidden.device)
    for rows in _chunks(len(hidden)):
        scaled = _scaled_logits(hidden[rows], weight, linear.bias, softmax)
        statistics = _statistics(scaled, tokens[rows], entropy)
        logprobs[rows] = statistics.logprobs
        if entropies is not None:
            entropies[rows] = statistics.entropies
        if top_k:
            top = scaled.topk(top_k, dim=-1)
            top_ids[rows] = top.indices
            top_logprobs[rows] = top.values - statistics.normalisers.unsqueeze(-1)
    return TokenDistributions(logprobs, entropies, top_ids, top_logprobs)


@dataclass(frozen=True, slots=True)
class _Softmax:
    """How the output layer's x becomes what the softmax is taken of: y = x / divisor, z = bound * tanh(y / bound).

    Without a bound z = y. The temperature T divides scaled or capped logits: divisor = T / scale, bound = cap / T.
    """

    divisor: float
    bound: float | None

    @staticmethod
    def of(temperature: float, transform: LogitTransform) -> _Softmax:
        """At a temperature, for a model that does this to its logits."""
        cap = transform.cap
        return _Softmax(temperature / transform.scale, None if cap is None else cap / temperature)


class _TokenLogprobs(torch.autograd.Function):
    """With p = softmax(z), and H the entropy:

    d logprob_y / dz_j = [j = y] - p_j,        dH / dz_j = -p_j * (log p_j + H)

    and dz / dx = 1 / divisor, times 1 - (z / bound)^2 where there is a bound.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        softmax: _Softmax,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cast_weight = weight.to(hidden.dtype)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers, entropies = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        scaled: torch.Tensor | None = None
        for rows in _chunks(len(hidden)):
            scaled = None  # One chunk's at a time, this one's not yet made.
            scaled = _scaled_logits(hidden[rows], cast_weight, bias, softmax)
            logprobs[rows], normalisers[rows], entropies[rows] = _statistics(scaled, tokens[rows], with_entropy)
        ctx.last_scaled = scaled if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, tokens, normalisers, entropies)
        ctx.softmax = softmax
        ctx.with_entropy = with_entropy
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, tokens, normalisers, entropies = ctx.saved_tensors
        of_logprobs, of_entropy = (gradient / ctx.softmax.divisor for gradient in gradients)
        cast_weight = weight.to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden)
        # The head of a model that is trained by an adapter stands still.
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        # A constant entropy, as in most runs, has a gradient of zeros; its passes over the vocabulary are saved.
        through_entropy = ctx.with_entropy and bool(of_entropy.any())
        # Overwritten below, so a second backward pass through the same graph makes it again, too.
        last_scaled, ctx.last_scaled = ctx.last_scaled, None
        chunks = _chunks(len(hidden))
        for rows in reversed(chunks):
            log_p = last_scaled
            if log_p is None:
                log_p = _scaled_logits(hidden[rows], cast_weight, bias, ctx.softmax)
            last_scaled = None
            bound = ctx.softmax.bound
            bend = None if bound is None else (log_p / bound).square_().neg_().add_(1.0)
            log_p -= normalisers[rows].unsqueeze(-1)
            if through_entropy:
                slope = torch.exp(log_p)
                log_p += entropies[rows].unsqueeze(-1)
                factor = log_p.mul_(of_entropy[rows].unsqueeze(-1)).add_(of_logprobs[rows].unsqueeze(-1))
                slope *= factor.neg_()
            else:
                slope = log_p.exp_()
                slope *= -of_logprobs[rows].unsqueeze(-1)
            slope.scatter_add_(-1, tokens[rows].unsqueeze(-1), of_logprobs[rows].unsqueeze(-1))
            if bend is not None:
                slope *= bend
            if bias_gradient is not None:
                bias_gradient += slope.sum(dim=0)
            narrow = slope.to(hidden.dtype)
            hidden_gradient[rows] = narrow @ cast_weight
            if weight_gradient is not None:
                _add_product(weight_gradient, narrow.T, hidden[rows], first=rows == chunks[-1])
        if weight_gradient is not None and not chunks:
            weight_gradient.zero_()
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
    """total = left @ right, or total += left @ right, without a product of its own where the dtypes agree.

    As large as the vocabulary's weights, it would cost as much to write and to add as the matrix product itself.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


class _Statistics(NamedTuple):
    """Of a chunk's positions, float32 [positions]: `entropies` are zeros unless wanted."""

    logprobs: torch.Tensor
    normalisers: torch.Tensor
    entropies: torch.Tensor


def _statistics(scaled: torch.Tensor, tokens: torch.Tensor, with_entropy: bool) -> _Statistics:
    """Logprob of each token, log of the softmax's denominator, entropy; `scaled` is float32 [positions, V]."""
    normalisers = torch.logsumexp(scaled, dim=-1)
    logprobs = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normalisers
    if not with_entropy:
        return _Statistics(logprobs, normalisers, torch.zeros_like(logprobs))
    return _Statistics(logprobs, normalisers, _entropies(scaled, normalisers))


def _entropies(scaled: torch.Tensor, normalisers: torch.Tensor) -> torch.Tensor:
    """-sum(p log p), in which no term is negative.

    The normaliser less the mean of `scaled` would be the same, but for the digits that both lose where logits are
    large: by half a nat at temperature 0.01, and below zero. In parts, because log p takes a buffer of its own.
    """
    found: list[torch.Tensor] = []
    for rows, normaliser in zip(scaled.split(_ENTROPY_ROWS), normalisers.split(_ENTROPY_ROWS), strict=True):
        log_p = rows - normaliser.unsqueeze(-1)
        found.append(0.0 - torch.linalg.vecdot(log_p.exp(), log_p))
    return torch.cat(found)


def _scaled_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softmax: _Softmax
) -> torch.Tensor:
    """What the softmax of a chunk is taken of, float32, in a buffer of its own."""
    logits = (hidden @ weight.T).float()
    if bias is not None:
        logits += bias
    if softmax.divisor != 1.0:
        logits.div_(softmax.divisor)
    return logits if softmax.bound is None else logits.div_(softmax.bound).tanh_().mul_(softmax.bound)


def _chunks(positions: int) -> list[slice]:
    """All positions; the last chunk is a whole one where there are enough."""
    ends = range(positions, 0, -CHUNK_POSITIONS)
    return [slice(max(end - CHUNK_POSITIONS, 0), end) for end in reversed(ends)]
