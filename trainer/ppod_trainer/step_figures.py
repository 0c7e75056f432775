"""A step's metrics: of its rollouts, and of its update. What each name means: `metrics.GAUGES`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppod_trainer.experience import PpoBatch
from ppod_trainer.learner import UpdateStats
from ppod_trainer.rollouts import ScoredRollout, common_temperature
from ppod_trainer.rounding import alike


def rollout_figures(rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
    """Outcomes, groups and lengths; nothing of groups where no prompt has two samples, which then say nothing."""
    paid = [one.outcome for one in rollouts]
    outcomes = np.array(paid)
    groups: dict[int, list[float]] = {}
    for one in rollouts:
        groups.setdefault(one.rollout.group, []).append(one.outcome)
    uniform = [alike(group) for group in groups.values() if len(group) > 1]
    return ({"groups/uniform": float(np.mean(uniform))} if uniform else {}) | {
        "score/mean": float(outcomes.mean()),
        "score/std": 0.0 if alike(paid) else float(outcomes.std()),
        "sampler/temperature": common_temperature([one.rollout for one in rollouts]),
        "response/length": float(np.mean([one.rollout.sampled for one in rollouts])),
        "response/distinct_2": distinct_bigrams(rollouts),
        "response/truncated": float(np.mean([one.rollout.truncated for one in rollouts])),
    }


def distinct_bigrams(rollouts: Sequence[ScoredRollout]) -> float:
    """Different bigrams of sampled tokens over all of them, all responses together (Li et al. 2016); 1 for none."""
    sampled = [one.rollout.response[one.rollout.action_mask].astype(np.int64) for one in rollouts]
    # A bigram as one number: token ids are below 2^31.
    bigrams = np.concatenate([(tokens[:-1] << 32) | tokens[1:] for tokens in sampled])
    return len(np.unique(bigrams)) / len(bigrams) if len(bigrams) else 1.0


def update_figures(batch: PpoBatch, stats: UpdateStats) -> dict[str, float]:
    """Returns, KL, losses and what the policy did. An update without a step measured no entropy."""
    entropy = {"policy/entropy": stats.entropy} if stats.optimizer_steps else {}
    return entropy | {
        "return/mean": batch.mean_return,
        "kl/reference": batch.mean_kl,
        "policy/clip_fraction": stats.clip_fraction,
        "policy/dual_clip_fraction": stats.dual_clip_fraction,
        "policy/ratio_bounded": stats.ratio_bounded,
        "sampler/mismatched": batch.mismatched,
        "policy/approx_kl": stats.approx_kl,
        "policy/first_ratio_error": stats.first_ratio_error,
        "policy/grad_norm": stats.grad_norm,
        "policy/optimizer_steps": float(stats.optimizer_steps),
        "policy/stopped_early": float(stats.stopped_early),
        "loss/policy": stats.policy_loss,
        "loss/value": stats.value_loss,
        "loss/kl": stats.kl_loss,
        "value/std": float(batch.old_values[batch.responses.action_mask].std(correction=0)),
        "value/explained_variance": stats.explained_variance,
    }
