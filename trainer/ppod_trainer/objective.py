"""PPO's objective for language models, as token losses and their sum.

    L = L_policy + c1 * L_value - c2 * H + c3 * KL            (minimised)

Shape legend: B sequences, T response tokens. Every function takes and gives float32 [B, T], unreduced: reduction is
`masking.weighted_sum`, with weights over the whole minibatch.
"""

from __future__ import annotations

import torch


def policy_token_loss(
    new_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> torch.Tensor:
    """Clipped surrogate, negated (Schulman et al. 2017, equation 7): max(-A * ratio, -A * clip(ratio, 1 +- clip))."""
    ratio = torch.exp(new_logprobs - old_logprobs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_token_loss(
    new_values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Half the larger of the squared errors of the value and of the value clipped to old_values +- clip."""
    errors = (new_values - returns).square()
    if clip is None:
        return errors / 2
    clipped = old_values + (new_values - old_values).clamp(-clip, clip)
    return torch.maximum(errors, (clipped - returns).square()) / 2


def importance_weights(old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance weights min(pi_old / pi_sampler, cap) that correct the sampler's mismatch; no gradient.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return torch.exp((old_logprobs - sampler_logprobs).detach()).clamp(max=cap)


def clipped_tokens(
    new_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> torch.Tensor:
    """True where clipping took the gradient away: ratio above 1 + clip with A > 0, below 1 - clip with A < 0."""
    ratio = torch.exp(new_logprobs - old_logprobs)
    return ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over flat real tokens; 0 where the returns do not vary."""
    spread = returns.var(unbiased=False)
    if spread <= 0:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / spread)
