"""The PPO update: epochs of minibatches over one step's experience."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ppod_trainer.config import OptimizerConfig, PpoConfig
from ppod_trainer.errors import NonFiniteLossError
from ppod_trainer.experience import ExperienceRules, PpoBatch, build_ppo_batch, view_policy
from ppod_trainer.kl import estimate_kl
from ppod_trainer.masking import loss_weights, weighted_sum
from ppod_trainer.metrics import StepTimer
from ppod_trainer.objective import (
    clipped_tokens,
    explained_variance,
    importance_weights,
    policy_token_loss,
    value_token_loss,
)
from ppod_trainer.policy import PolicyWithValue, build_response_batch
from ppod_trainer.rollouts import ScoredRollout


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak learning rate at a step from 0: linear warm-up, then linear decay to `final_fraction`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return 1.0 - (1.0 - config.final_fraction) * progress


@dataclass(slots=True)
class UpdateStats:
    """Means over the minibatches of one update; logprob differences in nats.

    Attributes:
        first_ratio_error: largest |ratio - 1| of the first minibatch; 0 unless something is wrong.
        approx_kl: KL(old, new) by k3, nats a token, of the last minibatch.
        stopped_early: the update ended because KL(old, new) passed `stop_kl`.
    """

    policy_loss: float = 0.0
    value_loss: float = 0.0
    kl_loss: float = 0.0
    entropy: float = 0.0
    clip_fraction: float = 0.0
    grad_norm: float = 0.0
    first_ratio_error: float = 0.0
    approx_kl: float = 0.0
    explained_variance: float = 0.0
    stopped_early: bool = False
    optimizer_steps: int = 0


@dataclass(slots=True)
class _Sums:
    """What the micro-batches of one minibatch add up to; weights over the minibatch make these its means."""

    policy: float = 0.0
    value: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    approx_kl: float = 0.0
    ratio_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Learner:
    """Owns the policy's optimizer. All configuration that the update obeys is here."""

    policy: PolicyWithValue
    optimizer: torch.optim.Optimizer
    ppo: PpoConfig
    rules: ExperienceRules
    seed: int
    base_rates: list[float] = field(default_factory=list[float])

    def learn(
        self, rollouts: Sequence[ScoredRollout], step: int, rate_factor: float, kl_coefficient: float, timer: StepTimer
    ) -> tuple[PpoBatch, UpdateStats]:
        """Update the policy on one step's rollouts.

        Raises:
            NonFiniteLossError: a gradient is NaN or infinite; the weights are those of the last good minibatch.
        """
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate_factor
        responses = build_response_batch(rollouts, self.policy.value_head.weight.device)
        with timer.phase("old_logprobs"):
            first = [micro for minibatch in self._minibatches(len(rollouts), step, 0) for micro in minibatch]
            view = view_policy(self.policy, responses, first)
        batch = build_ppo_batch(rollouts, responses, view, self.rules, kl_coefficient)
        with timer.phase("update"):
            stats = self._update(batch, step, kl_coefficient)
        mask = batch.loss_mask
        stats.explained_variance = explained_variance(batch.old_values[mask], batch.returns[mask])
        return batch, stats

    def _update(self, batch: PpoBatch, step: int, kl_coefficient: float) -> UpdateStats:
        stats = UpdateStats()
        for epoch in range(self.ppo.epochs):
            for number, minibatch in enumerate(self._minibatches(len(batch.loss_mask), step, epoch)):
                where = f"step {step + 1}, epoch {epoch + 1}, minibatch {number + 1}"
                sums = self._accumulate(batch, minibatch, kl_coefficient)
                if epoch == 0 and number == 0:
                    stats.first_ratio_error = sums.ratio_error
                stats.approx_kl = sums.approx_kl
                if self.ppo.stop_kl is not None and sums.approx_kl > self.ppo.stop_kl:
                    self.optimizer.zero_grad()
                    stats.stopped_early = True
                    return _mean_of(stats)
                self._apply(stats, sums, where)
        return _mean_of(stats)

    def _apply(self, stats: UpdateStats, sums: _Sums, where: str) -> None:
        """Clip the gradient, take the optimizer's step, add to the statistics."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.ppo.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NonFiniteLossError(
                f"{where}: the gradient's norm is {norm} (policy loss {sums.policy:g}, value loss {sums.value:g}); "
                "lower optimizer.learning_rate, set rewards.clip, or compute in float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        stats.optimizer_steps += 1
        stats.grad_norm += norm
        stats.policy_loss += sums.policy
        stats.value_loss += sums.value
        stats.kl_loss += sums.kl
        stats.entropy += sums.entropy
        stats.clip_fraction += sums.clipped

    def _accumulate(self, batch: PpoBatch, minibatch: Sequence[torch.Tensor], kl_coefficient: float) -> _Sums:
        """Add the gradients of a minibatch's micro-batches; the loss is normalised over the whole minibatch."""
        sums = _Sums()
        rows = torch.cat(list(minibatch))
        weights = torch.zeros_like(batch.old_logprobs)
        weights[rows] = loss_weights(batch.loss_mask[rows], self.ppo.aggregation)
        for index in minibatch:
            self._backward(batch, index, weights, kl_coefficient, sums)
        return sums

    def _backward(
        self, batch: PpoBatch, index: torch.Tensor, weights: torch.Tensor, kl_coefficient: float, sums: _Sums
    ) -> None:
        """Forward and backward of one micro-batch: L = L_policy + c1 * L_value - c2 * H + c3 * KL."""
        responses = batch.responses.rows(index)
        width = responses.responses.shape[1]

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[index, :width]

        output = self.policy(responses)
        old_logprobs, advantages, weight = cut(batch.old_logprobs), cut(batch.advantages), cut(weights)
        losses = policy_token_loss(output.logprobs, old_logprobs, advantages, self.ppo.clip)
        if self.ppo.importance_cap is not None:
            losses = losses * importance_weights(old_logprobs, cut(batch.sampler_logprobs), self.ppo.importance_cap)
        policy_loss = weighted_sum(losses, weight)
        value_losses = value_token_loss(output.values, cut(batch.old_values), cut(batch.returns), self.ppo.value_clip)
        value_loss = weighted_sum(value_losses, weight)
        entropy = weighted_sum(output.entropy, weight)
        loss = policy_loss + self.ppo.value_coefficient * value_loss
        if self.ppo.entropy_coefficient:
            loss = loss - self.ppo.entropy_coefficient * entropy
        if self.rules.kl.placement == "loss":
            kl = weighted_sum(estimate_kl(output.logprobs, cut(batch.ref_logprobs), self.rules.kl.estimator), weight)
            loss = loss + kl_coefficient * kl
            sums.kl += float(kl.detach())
        loss.backward()
        with torch.no_grad():
            clipped = clipped_tokens(output.logprobs, old_logprobs, advantages, self.ppo.clip)
            change = estimate_kl(old_logprobs, output.logprobs, "k3")
            ratio_error = torch.exp(output.logprobs - old_logprobs) - 1
            sums.policy += float(policy_loss)
            sums.value += float(value_loss)
            sums.entropy += float(entropy)
            sums.clipped += float(weighted_sum(clipped.float(), weight))
            sums.approx_kl += float(weighted_sum(change, weight))
            sums.ratio_error = max(sums.ratio_error, float(torch.where(weight > 0, ratio_error.abs(), 0.0).max()))

    def _minibatches(self, samples: int, step: int, epoch: int) -> Iterator[list[torch.Tensor]]:
        """Row positions of each minibatch, cut into micro-batches, by (seed, step, epoch) alone."""
        order = np.random.default_rng([self.seed, 1, step, epoch]).permutation(samples)
        for part in np.array_split(order, min(self.ppo.minibatches, samples)):
            size = self.ppo.micro_batch_size or len(part)
            yield [torch.from_numpy(part[start : start + size]) for start in range(0, len(part), size)]


def build_learner(
    policy: PolicyWithValue, ppo: PpoConfig, rules: ExperienceRules, optimizer: OptimizerConfig, seed: int
) -> Learner:
    """Make a learner with Adam: epsilon 1e-5 by default, as PPO implementations use (Huang et al. 2022, detail 3)."""
    rates = [optimizer.learning_rate, optimizer.value_learning_rate or optimizer.learning_rate]
    adam = torch.optim.AdamW(
        [
            {"params": list(policy.model.parameters()), "lr": rates[0]},
            {"params": list(policy.value_head.parameters()), "lr": rates[1]},
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    return Learner(policy, adam, ppo, rules, seed, rates)


def _mean_of(stats: UpdateStats) -> UpdateStats:
    """Turn the sums over minibatches into means."""
    count = max(stats.optimizer_steps, 1)
    for name in ("policy_loss", "value_loss", "kl_loss", "entropy", "clip_fraction", "grad_norm"):
        setattr(stats, name, getattr(stats, name) / count)
    return stats
