"""The whole objective over some rows of a minibatch, minimised:

    L = L_policy + c1 * L_value - c2 * H + c3 * KL

Each term is sum(weight * token loss) with `masking.loss_weights` over the whole minibatch, so that the gradients of its
micro-batches, on however many ranks, add up to the minibatch's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ppod_trainer.config import KlConfig, PpoConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import PpoBatch
from ppod_trainer.kl import estimate_kl
from ppod_trainer.masking import weighted_sum
from ppod_trainer.objective import clipped_tokens, importance_weights, policy_token_loss, value_token_loss
from ppod_trainer.policy import PolicyOutput


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
    """

    weights: torch.Tensor
    old_logprobs: torch.Tensor
    sampler_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

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
        )


@dataclass(slots=True)
class LossFigures:
    """What the micro-batches of a minibatch add up to: its means. Logprob differences in nats.

    Attributes:
        policy, value, kl, entropy: the terms, before their coefficients.
        clipped: share of tokens whose gradient was clipped away.
        approx_kl: KL(old, new) by k3, nats a token.
        ratio_error: largest |ratio - 1|; the only one that is a maximum.
    """

    policy: float = 0.0
    value: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
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
    losses = policy_token_loss(output.logprobs, rows.old_logprobs, rows.advantages, ppo.clip)
    if ppo.importance_cap is not None:
        losses = losses * importance_weights(rows.old_logprobs, rows.sampler_logprobs, ppo.importance_cap)
    policy = weighted_sum(losses, weights)
    entropy = weighted_sum(output.entropy, weights)
    loss, figures = policy, LossFigures(policy=float(policy.detach()), entropy=float(entropy.detach()))
    if objective.critic:
        value = weighted_sum(value_token_loss(output.values, rows.old_values, rows.returns, ppo.value_clip), weights)
        loss = loss + ppo.value_coefficient * value
        figures.value = float(value.detach())
    if controls.entropy_coefficient:
        loss = loss - controls.entropy_coefficient * entropy
    if objective.kl.placement == "loss":
        kl = weighted_sum(estimate_kl(output.logprobs, rows.ref_logprobs, objective.kl.estimator), weights)
        loss = loss + controls.kl_coefficient * kl
        figures.kl = float(kl.detach())
    _measure_change(output.logprobs.detach(), rows, ppo, figures)
    return loss, figures


def _measure_change(logprobs: torch.Tensor, rows: LossRows, ppo: PpoConfig, figures: LossFigures) -> None:
    clipped = clipped_tokens(logprobs, rows.old_logprobs, rows.advantages, ppo.clip)
    figures.clipped = float(weighted_sum(clipped.float(), rows.weights))
    figures.approx_kl = float(weighted_sum(estimate_kl(rows.old_logprobs, logprobs, "k3"), rows.weights))
    error = torch.exp(logprobs - rows.old_logprobs) - 1
    figures.ratio_error = float(torch.where(rows.weights > 0, error.abs(), 0.0).max())
