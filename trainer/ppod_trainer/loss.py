"""The whole objective over some rows of a minibatch, minimised:

    L = -L_clip + c1 L_value - c2 H + c3 KL

    L_clip  = sum_t w_t rho_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)      `objective.policy_token_loss`
              and where A_t < 0 at least w_t rho_t dual A_t                       (dual clip)
    L_value = sum_t w_t max((V_t - R_t)^2, (clip(V_t, V_old,t +- e) - R_t)^2) / 2 `objective.value_token_loss`
    H       = sum_t w_t H(pi(. | s_t)), the entropy of the whole distribution at the sampling temperature
    KL      = sum_t w_t k_t, an estimate of KL(pi, reference)                     `kl.kl_token_loss`

    r_t     = pi(t) / pi_old(t) of the token or of its sequence                   `ratios.policy_log_ratios`
    rho_t   = min(pi_old(t) / pi_sampler(t), cap), or 1, without gradient         `sampler_mismatch.importance_weights`
    w_t     = the share of the token in the loss: the aggregation                 `masking.loss_weights`

c1 is `ppo.value_coefficient`, c2 the step's entropy coefficient, c3 the step's KL coefficient where the penalty is in
the loss; in the reward it is part of A_t and R_t instead, and c3 is 0. rho_t weighs the policy's term alone: values
and entropy have no action that was sampled. What `ppo.ratio_mask` leaves out has w_t = 0 in every term.

The weights are over the whole minibatch, so that the gradients of its micro-batches, on however many ranks, add up to
the minibatch's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ppod_trainer.config import KlConfig, PpoConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import PpoBatch
from ppod_trainer.kl import estimate_kl, kl_token_loss
from ppod_trainer.masking import weighted_sum
from ppod_trainer.objective import (
    ClipRange,
    clipped_tokens,
    dual_clipped_tokens,
    policy_token_loss,
    value_token_loss,
)
from ppod_trainer.policy import PolicyOutput
from ppod_trainer.ratios import BOUND, bounded_expm1, policy_log_ratios
from ppod_trainer.sampler_mismatch import importance_weights


@dataclass(frozen=True, slots=True)
class Objective:
    """What the loss obeys.

    Attributes:
        ppo: clipping, coefficients and corrections.
        kl: placement and estimator of the KL penalty.
        critic: whether there is a value loss.
    """

    ppo: PpoConfig
    kl: KlConfig
    critic: bool = True


@dataclass(frozen=True, slots=True)
class LossRows:
    """What the loss reads of the experience, for the rows of a micro-batch: float32 [B, T].

    Attributes:
        weights: of each token in the minibatch's loss; 0 where it does not count.
        old_logprobs, sampler_logprobs, ref_logprobs, old_values, advantages, returns: as in `PpoBatch`.
        total: sum of the weights over the whole minibatch. With Dr. GRPO's constant it is not 1, and figures that are
            means and shares have to be divided by it.
    """

    weights: torch.Tensor
    old_logprobs: torch.Tensor
    sampler_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    total: float = 1.0

    @staticmethod
    def of(batch: PpoBatch, index: torch.Tensor, weights: torch.Tensor, width: int) -> LossRows:
        """The rows at these positions, cut to `width` tokens; weights: float32, of the whole batch's shape."""
        columns = slice(0, width)
        return LossRows(
            weights=weights[index, columns],
            old_logprobs=batch.old_logprobs[index, columns],
            sampler_logprobs=batch.sampler_logprobs[index, columns],
            ref_logprobs=batch.ref_logprobs[index, columns],
            old_values=batch.old_values[index, columns],
            advantages=batch.advantages[index, columns],
            returns=batch.returns[index, columns],
            # A minibatch of which nothing counts has figures of 0.
            total=float(weights.sum()) or 1.0,
        )


@dataclass(slots=True)
class LossFigures:
    """What the micro-batches of a minibatch add up to: its means. Logprob differences in nats.

    Attributes:
        policy, value, kl, entropy: the terms, before their coefficients.
        clipped: share of tokens whose gradient was clipped away.
        dual_clipped: share of tokens whose gradient the dual clip took.
        bounded: share of tokens whose ratio was held, see `ratios`; 0 in a sound run.
        approx_kl: KL(old, new) by k3, nats a token.
        ratio_error: largest |ratio - 1|; the only one that is a maximum.
    """

    policy: float = 0.0
    value: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    dual_clipped: float = 0.0
    bounded: float = 0.0
    approx_kl: float = 0.0
    ratio_error: float = 0.0

    def add(self, other: LossFigures) -> None:
        """Take in another micro-batch's."""
        for one in fields(self):
            mine, others = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, max(mine, others) if one.name == "ratio_error" else mine + others)


def minibatch_loss(
    output: PolicyOutput, rows: LossRows, objective: Objective, controls: StepControls
) -> tuple[torch.Tensor, LossFigures]:
    """The loss of some rows, a scalar with gradient, and its figures."""
    ppo, weights = objective.ppo, rows.weights
    policy = _policy_loss(output.logprobs, rows, ppo)
    entropy = weighted_sum(output.entropy, weights)
    loss, figures = policy, LossFigures(policy=float(policy.detach()), entropy=float(entropy.detach()) / rows.total)
    if objective.critic:
        value = weighted_sum(value_token_loss(output.values, rows.old_values, rows.returns, ppo.value_clip), weights)
        loss = loss + ppo.value_coefficient * value
        figures.value = float(value.detach())
    if controls.entropy_coefficient:
        loss = loss - controls.entropy_coefficient * entropy
    if objective.kl.placement == "loss":
        kl = weighted_sum(
            kl_token_loss(
                output.logprobs,
                rows.old_logprobs,
                rows.ref_logprobs,
                objective.kl.estimator,
                importance_weighted=objective.kl.importance_weighted,
            ),
            weights,
        )
        loss = loss + controls.kl_coefficient * kl
        figures.kl = float(kl.detach())
    _measure_change(output.logprobs.detach(), rows, ppo, figures)
    return loss, figures


def _policy_loss(logprobs: torch.Tensor, rows: LossRows, ppo: PpoConfig) -> torch.Tensor:
    mask = rows.weights > 0
    log_ratios = policy_log_ratios(logprobs, rows.old_logprobs, mask, ppo.ratio)
    losses = policy_token_loss(log_ratios, rows.advantages, _clip_range(ppo))
    if ppo.importance_cap is not None:
        losses = losses * importance_weights(
            rows.old_logprobs, rows.sampler_logprobs, mask, ppo.importance_cap, ppo.importance_level
        )
    return weighted_sum(losses, rows.weights)


def _clip_range(ppo: PpoConfig) -> ClipRange:
    return ClipRange(low=ppo.clip, high=ppo.highest_ratio, dual=ppo.dual_clip)


def _measure_change(logprobs: torch.Tensor, rows: LossRows, ppo: PpoConfig, figures: LossFigures) -> None:
    weights, mask, clip = rows.weights / rows.total, rows.weights > 0, _clip_range(ppo)
    log_ratios = policy_log_ratios(logprobs, rows.old_logprobs, mask, ppo.ratio)
    figures.clipped = float(weighted_sum(clipped_tokens(log_ratios, rows.advantages, clip).float(), weights))
    figures.dual_clipped = float(weighted_sum(dual_clipped_tokens(log_ratios, rows.advantages, clip).float(), weights))
    figures.bounded = float(weighted_sum((log_ratios > BOUND).float(), weights))
    figures.approx_kl = float(weighted_sum(estimate_kl(rows.old_logprobs, logprobs, "k3"), weights))
    error = bounded_expm1(logprobs - rows.old_logprobs)
    figures.ratio_error = float(torch.where(mask, error.abs(), 0.0).max())
