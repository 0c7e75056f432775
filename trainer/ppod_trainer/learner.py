"""The PPO update: epochs of minibatches over one step's experience."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import torch

from ppod_trainer.algorithms import LearnedEstimator
from ppod_trainer.config import OptimizerConfig, PpoConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.errors import NonFiniteLossError
from ppod_trainer.experience import ExperienceRules, PpoBatch, build_ppo_batch, pad_numbers, view_policy
from ppod_trainer.loss import LossFigures, LossRows, Objective, minibatch_loss
from ppod_trainer.masking import loss_weights
from ppod_trainer.metrics import StepTimer
from ppod_trainer.minibatches import Minibatch, SampleLengths, plan_minibatches
from ppod_trainer.objective import explained_variance
from ppod_trainer.policy import PolicyWithValue, ResponseBatch, build_response_batch
from ppod_trainer.ranks import Ranks
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.sharding import whole


@dataclass(slots=True)
class UpdateStats:
    """Means over the minibatches of one update, those without a token in the loss left out; differences in nats.

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
    dual_clip_fraction: float = 0.0
    ratio_bounded: float = 0.0
    grad_norm: float = 0.0
    first_ratio_error: float = 0.0
    approx_kl: float = 0.0
    explained_variance: float = 0.0
    stopped_early: bool = False
    optimizer_steps: int = 0


_MEANS = (
    "policy_loss",
    "value_loss",
    "kl_loss",
    "entropy",
    "clip_fraction",
    "dual_clip_fraction",
    "ratio_bounded",
    "grad_norm",
)


@dataclass(frozen=True, slots=True)
class Learner:
    """Owns the policy's optimizer. All configuration that the update obeys is here.

    Among several ranks each has one, and all must do the same at the same time, with the same rollouts.
    """

    policy: PolicyWithValue
    optimizer: torch.optim.Optimizer
    ppo: PpoConfig
    rules: ExperienceRules
    seed: int
    ranks: Ranks
    base_rates: list[float] = field(default_factory=list[float])

    def learn(
        self, rollouts: Sequence[ScoredRollout], step: int, controls: StepControls, timer: StepTimer
    ) -> tuple[PpoBatch, UpdateStats]:
        """Update the policy on one step's rollouts.

        Raises:
            NonFiniteLossError: a gradient is NaN or infinite; the weights are those of the last good minibatch.
        """
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * controls.rate_factor
        responses = build_response_batch(rollouts, self.ranks.device)
        with timer.phase("old_logprobs"):
            first = [micro for one in self._minibatches(responses, step, 0) for micro in one.shares[self.ranks.rank]]
            learned = isinstance(self.rules.estimator, LearnedEstimator)
            turns = pad_numbers([one.rollout.turns for one in rollouts], responses) if learned else None
            view = view_policy(self.policy, responses, first, self.ranks, turns)
        batch = build_ppo_batch(rollouts, responses, view, self.rules, controls)
        with timer.phase("update"):
            stats = self._update(batch, step, controls)
        mask = batch.loss_mask
        stats.explained_variance = explained_variance(batch.old_values[mask], batch.returns[mask])
        return batch, stats

    def _update(self, batch: PpoBatch, step: int, controls: StepControls) -> UpdateStats:
        stats = UpdateStats()
        for epoch in range(self.ppo.epochs):
            for number, minibatch in enumerate(self._minibatches(batch.responses, step, epoch)):
                if not batch.loss_mask[minibatch.rows].any():
                    # Adam would follow the momentum of earlier steps, and the figures would be means with zeros.
                    continue
                where = f"step {step + 1}, epoch {epoch + 1}, minibatch {number + 1}"
                sums = self._accumulate(batch, minibatch, controls)
                if not stats.optimizer_steps:
                    stats.first_ratio_error = sums.ratio_error
                stats.approx_kl = sums.approx_kl
                if self.ppo.stop_kl is not None and sums.approx_kl > self.ppo.stop_kl:
                    self.optimizer.zero_grad()
                    stats.stopped_early = True
                    return _mean_of(stats)
                self._apply(stats, sums, where)
        return _mean_of(stats)

    def _apply(self, stats: UpdateStats, sums: LossFigures, where: str) -> None:
        """Clip the gradient, take the optimizer's step, add to the statistics."""
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.ppo.max_grad_norm)))
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
        stats.dual_clip_fraction += sums.dual_clipped
        stats.ratio_bounded += sums.bounded

    def _accumulate(self, batch: PpoBatch, minibatch: Minibatch, controls: StepControls) -> LossFigures:
        """Add the gradients of this rank's micro-batches; the loss is normalised over the whole minibatch."""
        sums = LossFigures()
        weights = torch.zeros_like(batch.old_logprobs)
        weights[minibatch.rows] = loss_weights(
            batch.loss_mask[minibatch.rows], self.ppo.aggregation, self.ppo.constant_tokens
        )
        objective = Objective(self.ppo, self.rules.kl, self.rules.estimator.critic)
        for index in minibatch.shares[self.ranks.rank]:
            # A rank without samples takes part all the same, with one that counts nothing: it has part of each layer.
            counted, rows = (weights, index) if len(index) else (torch.zeros_like(weights), minibatch.rows[:1])
            output = self.policy(batch.responses.rows(rows), values_only=controls.critic_only)
            width = output.logprobs.shape[1]
            loss, figures = minibatch_loss(output, LossRows.of(batch, rows, counted, width), objective, controls)
            loss.backward()
            sums.add(figures)
        return self._over_ranks(sums)

    def _over_ranks(self, sums: LossFigures) -> LossFigures:
        total = LossFigures(*self.ranks.sums(astuple(sums)))
        total.ratio_error = self.ranks.largest(sums.ratio_error)
        return total

    def _minibatches(self, responses: ResponseBatch, step: int, epoch: int) -> list[Minibatch]:
        lengths = SampleLengths.of(responses)
        return list(plan_minibatches(lengths, self.seed, step, epoch, self.ppo, self.ranks.size))


def build_learner(
    policy: PolicyWithValue,
    ppo: PpoConfig,
    rules: ExperienceRules,
    optimizer: OptimizerConfig,
    seed: int,
    ranks: Ranks | None = None,
) -> Learner:
    """Make a learner with Adam: epsilon 1e-5 by default, as PPO implementations use (Huang et al. 2022, detail 3).

    Without `ranks` it is alone, on the device where the policy is.
    """
    for parameter in (*policy.policy_parameters(), *policy.critic_parameters()):
        if type(parameter.data) is torch.Tensor and parameter.device.type == "cpu":
            # It may lie in the mapped file that it was loaded from. Written to there, every 4 KiB cost a page fault and
            # a copy: the first update of SmolLM2 took 2 s longer.
            parameter.data = parameter.data.clone()
    rates = [optimizer.learning_rate, optimizer.value_learning_rate or optimizer.learning_rate]
    adam = torch.optim.AdamW(
        [
            {"params": policy.policy_parameters(), "lr": rates[0]},
            {"params": policy.critic_parameters(), "lr": rates[1]},
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    return Learner(policy, adam, ppo, rules, seed, ranks or Ranks(policy.device), rates)


def _mean_of(stats: UpdateStats) -> UpdateStats:
    """Turn the sums over minibatches into means."""
    count = max(stats.optimizer_steps, 1)
    for name in _MEANS:
        setattr(stats, name, getattr(stats, name) / count)
    return stats
