"""From scored rollouts to what the update learns from: old logprobs, values, rewards, advantages, returns.

Shape legend: B sequences, T response tokens, K turns, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ppod_trainer.algorithms import AdvantageEstimator, Experience
from ppod_trainer.algorithms.anchors import read_anchors
from ppod_trainer.algorithms.turns import last_tokens, states_at
from ppod_trainer.config import KlConfig, RatioMaskConfig, RewardsConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.kl import estimate_kl
from ppod_trainer.masking import masked_sum, whiten
from ppod_trainer.policy import PolicyWithValue, ResponseBatch
from ppod_trainer.potentials import shaping_rewards
from ppod_trainer.ranks import Ranks
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.sampler_mismatch import tokens_within
from ppod_trainer.score_shaping import normalised, shape_scores
from ppod_trainer.sharding import free_gathered
from ppod_trainer.token_rewards import token_rewards


@dataclass(frozen=True, slots=True)
class PolicyView:
    """The policy before the update: logprobs and values float32 [B, T], next_values float32 [B].

    turn_states: float32 [B, K, H], see `Experience`; None where nobody reads them.
    """

    logprobs: torch.Tensor
    values: torch.Tensor
    next_values: torch.Tensor
    turn_states: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PpoBatch:
    """One step's experience; float32 [B, T] where nothing else is said, 0 on padding.

    Attributes:
        responses: the padded token batch.
        loss_mask: bool [B, T]; action tokens that the loss is taken over.
        old_logprobs: the trainer's, before the update.
        sampler_logprobs: the sampler's.
        ref_logprobs: the reference's.
        old_values: the value head's, before the update.
        advantages: whitened where the configuration says so.
        returns: value targets.
        mean_kl: mean over samples of the summed k1 estimate against the reference, nats a response.
        mean_return: mean over samples of the summed token rewards, what shaping takes off among them.
        mismatched: share of action tokens left out for their ratio trainer / sampler.
    """

    responses: ResponseBatch
    loss_mask: torch.Tensor
    old_logprobs: torch.Tensor
    sampler_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mean_kl: float
    mean_return: float
    mismatched: float = 0.0


@torch.no_grad()
def view_policy(
    policy: PolicyWithValue,
    batch: ResponseBatch,
    micro_batches: Sequence[torch.Tensor],
    ranks: Ranks,
    turns: torch.Tensor | None = None,
) -> PolicyView:
    """Run the policy over a batch, each rank over its micro-batches (int64 row positions), and put them together.

    They are those of the first epoch, so that its first minibatch sees bit-equal logprobs and a ratio of exactly 1.
    With `turns`, int64 [B, T] as in `Experience`, the view has the states at their ends.
    """
    logprobs = torch.zeros(batch.response_mask.shape, device=batch.input_ids.device)
    values = torch.zeros_like(logprobs)
    next_values = torch.zeros(len(logprobs), device=logprobs.device)
    last = torch.zeros(len(logprobs), 0, dtype=torch.int64) if turns is None else last_tokens(turns)
    states = torch.zeros(*last.shape, policy.hidden_size, device=logprobs.device)
    for index in micro_batches:
        if not len(index):
            # The other ranks gather layers of which this one holds a part.
            policy(batch.rows(torch.zeros(1, dtype=torch.int64)))
            continue
        output = policy(batch.rows(index), with_states=turns is not None)
        width = output.logprobs.shape[1]
        logprobs[index, :width] = output.logprobs
        values[index, :width] = output.values
        next_values[index] = output.next_values
        if output.states is not None:
            states[index] = states_at(output.states, last[index])
    free_gathered(policy)
    # Each row is one rank's, and 0 on the others: the sum is exact.
    ranks.sum_in_place([logprobs, values, next_values, *([] if turns is None else [states])])
    return PolicyView(logprobs, values, next_values, None if turns is None else states)


@dataclass(frozen=True, slots=True)
class ExperienceRules:
    """How rewards and advantages are made.

    Attributes:
        rewards, kl: what is paid.
        estimator: of advantages.
        whiten: advantages to mean 0 and variance 1 over the loss's tokens.
        ratio_mask: what to leave out of the loss for the sampler's mismatch; None: nothing.
        gamma: discount, that potentials are shaped with.
    """

    rewards: RewardsConfig
    kl: KlConfig
    estimator: AdvantageEstimator
    whiten: bool
    ratio_mask: RatioMaskConfig | None = None
    gamma: float = 1.0


@torch.no_grad()
def build_ppo_batch(
    rollouts: Sequence[ScoredRollout],
    responses: ResponseBatch,
    view: PolicyView,
    rules: ExperienceRules,
    controls: StepControls,
) -> PpoBatch:
    """Turn scores into token rewards, and those into advantages and returns."""
    mask = responses.action_mask
    ref_logprobs = _pad_actions([scored.ref_logprobs for scored in rollouts], responses)
    sampler_logprobs = _pad_actions([scored.rollout.sampler_logprobs for scored in rollouts], responses)
    experience = _experience(rollouts, responses, view, ref_logprobs, rules, controls)
    result = rules.estimator.estimate(experience)
    matched = _matched_tokens(view.logprobs, sampler_logprobs, mask, rules.ratio_mask)
    loss_mask = matched & ~experience.truncated.unsqueeze(1) if rules.rewards.mask_truncated else matched
    kl = estimate_kl(view.logprobs, ref_logprobs, "k1")
    return PpoBatch(
        responses=responses,
        loss_mask=loss_mask,
        old_logprobs=view.logprobs,
        sampler_logprobs=sampler_logprobs,
        ref_logprobs=ref_logprobs,
        old_values=view.values,
        advantages=whiten(result.advantages, loss_mask) if rules.whiten else result.advantages,
        returns=result.returns,
        mean_kl=float(masked_sum(kl, mask)) / len(rollouts),
        mean_return=float(experience.rewards.sum()) / len(rollouts),
        mismatched=1 - float(matched.sum() / mask.sum()),
    )


def _experience(
    rollouts: Sequence[ScoredRollout],
    responses: ResponseBatch,
    view: PolicyView,
    ref_logprobs: torch.Tensor,
    rules: ExperienceRules,
    controls: StepControls,
) -> Experience:
    """What was paid for each token, and all that an estimator of advantages may look at."""
    device, mask = responses.input_ids.device, responses.action_mask
    turn_rewards = _pad_actions([scored.rollout.rewards for scored in rollouts], responses)
    truncated = torch.tensor([scored.rollout.truncated for scored in rollouts], device=device)
    scores = torch.tensor([scored.score for scored in rollouts], device=device)
    scores = shape_scores(scores, truncated, mask.sum(dim=1), rules.rewards, controls.score)
    penalty = estimate_kl(view.logprobs, ref_logprobs, rules.kl.estimator) if rules.kl.placement == "reward" else None
    paid = token_rewards(scores, None, mask, 0.0, turn_rewards)
    shaping = _shaping(rollouts, responses, rules, controls)
    anchors = read_anchors([scored.rollout for scored in rollouts])
    return Experience(
        rewards=token_rewards(scores, penalty, mask, controls.kl_coefficient, turn_rewards + shaping),
        paid=paid,
        outcomes=paid.double().sum(dim=1).float(),
        values=view.values,
        next_values=view.next_values,
        mask=mask,
        truncated=truncated,
        groups=torch.tensor([scored.rollout.group for scored in rollouts], device=device),
        prompts=torch.tensor([scored.rollout.prompt.index for scored in rollouts], device=device),
        turns=pad_numbers([scored.rollout.turns for scored in rollouts], responses),
        contexts=pad_numbers(anchors.contexts, responses),
        observations=pad_numbers(anchors.observations, responses),
        turn_states=view.turn_states,
    )


def _shaping(
    rollouts: Sequence[ScoredRollout], responses: ResponseBatch, rules: ExperienceRules, controls: StepControls
) -> torch.Tensor:
    """What shaping adds to the token rewards, float32 [B, T]; in the units of the shaped scores."""
    mask = responses.action_mask
    if rules.rewards.shaping == "none":
        return torch.zeros(mask.shape, device=mask.device)
    found = [scored.potentials for scored in rollouts if scored.potentials is not None]
    potentials = normalised(_pad_actions(found, responses), rules.rewards, controls.score)
    return shaping_rewards(potentials, mask, rules.gamma)


def _matched_tokens(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor, config: RatioMaskConfig | None
) -> torch.Tensor:
    """The action tokens, bool [B, T], that trainer and sampler agree about enough to learn from."""
    if config is None:
        return mask
    return tokens_within(old_logprobs, sampler_logprobs, mask, (config.low, config.high), config.level)


def pad_numbers(rows: Sequence[npt.NDArray[np.int64]], responses: ResponseBatch) -> torch.Tensor:
    """Numbers of action tokens, below 2^24, as int64 [B, T]; -1 elsewhere."""
    return torch.where(responses.action_mask, _pad(rows, responses.response_mask), -1).long()


def _pad_actions(rows: Sequence[npt.NDArray[np.float32]], responses: ResponseBatch) -> torch.Tensor:
    """Values of action tokens as float32 [B, T]; 0 elsewhere."""
    return torch.where(responses.action_mask, _pad(rows, responses.response_mask), 0.0)


def _pad(rows: Sequence[npt.NDArray[np.float32] | npt.NDArray[np.int64]], mask: torch.Tensor) -> torch.Tensor:
    """Right-pad ragged rows, whose lengths are the mask's, with zeros."""
    flat = torch.from_numpy(np.concatenate(rows).astype(np.float32))
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat.to(mask.device))
