"""The update: exact first ratio, accumulation that changes nothing, clipping, early stop, refusal of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ppod_trainer.algorithms import build_estimator
from ppod_trainer.config import AdvantagesConfig, KlConfig, OptimizerConfig, PpoConfig, RatioMaskConfig, RewardsConfig
from ppod_trainer.controls import StepControls, learning_rate_at
from ppod_trainer.errors import NonFiniteLossError
from ppod_trainer.experience import ExperienceRules
from ppod_trainer.learner import Learner, build_learner
from ppod_trainer.metrics import StepTimer
from ppod_trainer.off_policy import measure_off_policy
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.rollouts import ScoredRollout

Make = Callable[..., list[ScoredRollout]]


def learner_of(
    policy: PolicyWithValue,
    ppo: PpoConfig | None = None,
    *,
    rewards: RewardsConfig | None = None,
    kl: KlConfig | None = None,
    advantages: AdvantagesConfig | None = None,
) -> Learner:
    advantages = advantages or AdvantagesConfig()
    ppo = ppo or PpoConfig()
    made = ExperienceRules(
        rewards or RewardsConfig(),
        kl or KlConfig(),
        build_estimator(advantages),
        whiten=advantages.whiten,
        ratio_mask=ppo.ratio_mask,
    )
    return build_learner(policy, ppo, made, OptimizerConfig(learning_rate=1e-3), seed=0)


def parameters_of(policy: PolicyWithValue) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.parameters()]


def reset(policy: PolicyWithValue, saved: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), saved, strict=True):
            parameter.copy_(value)


def mapped_files(parameters: Iterable[nn.Parameter]) -> set[str]:
    """Files whose mapped memory these parameters lie in."""
    found: set[str] = set()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [
        (*(int(end, 16) for end in one[0].split("-")), one[5]) for one in ranges if len(one) > 5 and one[5][0] == "/"
    ]
    for parameter in parameters:
        found.update(name for first, last, name in files if first <= parameter.data_ptr() < last)
    return found


def test_what_is_trained_lies_in_no_file(policy: PolicyWithValue, tiny_model_dir: Path) -> None:
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    files = mapped_files(policy.parameters())
    assert files == {str(file) for file in tiny_model_dir.glob("*.safetensors")}
    tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    learner_of(policy)
    assert not mapped_files(policy.parameters())
    assert tied == (policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batch_tokens", [None, 20])
def test_ratio_is_exactly_one_in_the_first_minibatch(
    policy: PolicyWithValue, make_rollouts: Make, compute: torch.dtype, micro_batch_tokens: int | None
) -> None:
    made = PolicyWithValue(policy.model, compute_dtype=compute)
    ppo = PpoConfig(epochs=1, minibatches=1, micro_batch_tokens=micro_batch_tokens)
    _, stats = learner_of(made, ppo).learn(make_rollouts(), 0, StepControls(1.0, 0.05, 0.0), StepTimer())
    assert stats.first_ratio_error == 0.0
    assert stats.clip_fraction == 0.0
    assert stats.approx_kl == 0.0


def test_later_minibatches_see_a_moved_policy(policy: PolicyWithValue, make_rollouts: Make) -> None:
    ppo = PpoConfig(clip=1e-3, dual_clip=1.002)
    _, stats = learner_of(policy, ppo).learn(make_rollouts(), 0, StepControls(1.0, 0.05, 0.0), StepTimer())
    assert stats.first_ratio_error == 0.0
    assert stats.approx_kl > 0
    assert stats.optimizer_steps == 4
    assert 0 < stats.dual_clip_fraction < stats.clip_fraction < 1


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": "token_mean"},
        {"aggregation": "sequence_mean"},
        {"aggregation": "constant", "constant_tokens": 16},
        {"aggregation": "sequence_mean", "ratio": "sequence"},
        {"ratio": "sequence_token", "importance_cap": 2.0, "importance_level": "sequence"},
        {"ratio_mask": {"low": 0.5, "high": 5.0}},
    ],
)
def test_micro_batches_change_nothing(policy: PolicyWithValue, make_rollouts: Make, changes: dict[str, object]) -> None:
    saved, results = parameters_of(policy), []
    for micro in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 20}):
        reset(policy, saved)
        ppo = PpoConfig.model_validate({"epochs": 1, "minibatches": 1, **micro, **changes})
        _, stats = learner_of(policy, ppo).learn(make_rollouts(), 0, StepControls(1.0, 0.05, 0.0), StepTimer())
        results.append((stats.grad_norm, stats.policy_loss, stats.value_loss, stats.entropy))
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-4, abs=1e-6)


def test_order_of_the_samples_does_not_matter_to_the_gradient(policy: PolicyWithValue, make_rollouts: Make) -> None:
    saved, norms = parameters_of(policy), []
    for order in (1, -1):
        reset(policy, saved)
        ppo = PpoConfig(epochs=1, minibatches=1)
        _, stats = learner_of(policy, ppo).learn(make_rollouts()[::order], 0, StepControls(1.0, 0.05, 0.0), StepTimer())
        norms.append(stats.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_update_raises_the_logprob_of_good_samples(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """Sequence advantages with V = 0: the sample with the only positive score must become likelier, the others not."""
    torch.nn.init.zeros_(policy.value_head.weight)
    rollouts = [replace(scored, score=1.0 if row == 2 else -1.0) for row, scored in enumerate(make_rollouts())]
    learner = learner_of(
        policy,
        PpoConfig(epochs=1, minibatches=1),
        advantages=AdvantagesConfig(kind="sequence"),
        kl=KlConfig(coefficient=0),
    )
    before, _ = learner.learn(rollouts, 0, StepControls(1.0, 0.0, 0.0), StepTimer())
    after, _ = learner.learn(rollouts, 1, StepControls(1e-9, 0.0, 0.0), StepTimer())
    change = (after.old_logprobs - before.old_logprobs).sum(dim=1)
    assert change[2] > 0
    assert change.argmax() == 2


def test_same_seed_same_weights(policy: PolicyWithValue, make_rollouts: Make) -> None:
    saved, ends = parameters_of(policy), []
    for _ in range(2):
        reset(policy, saved)
        learner_of(policy).learn(make_rollouts(), 3, StepControls(1.0, 0.05, 0.0), StepTimer())
        ends.append(parameters_of(policy))
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


def test_update_stops_early_on_kl(policy: PolicyWithValue, make_rollouts: Make) -> None:
    ppo = PpoConfig(epochs=5, minibatches=2, stop_kl=1e-9)
    _, stats = learner_of(policy, ppo).learn(make_rollouts(), 0, StepControls(1.0, 0.05, 0.0), StepTimer())
    assert stats.stopped_early
    assert stats.optimizer_steps == 1


def test_nan_is_refused_and_the_weights_stay(policy: PolicyWithValue, make_rollouts: Make) -> None:
    saved = parameters_of(policy)
    rollouts = make_rollouts()
    rollouts[3] = replace(rollouts[3], score=float("nan"))
    with pytest.raises(NonFiniteLossError, match="step 8, epoch 1, minibatch 1"):
        learner_of(policy).learn(rollouts, 7, StepControls(1.0, 0.05, 0.0), StepTimer())
    assert all(torch.equal(first, second) for first, second in zip(saved, parameters_of(policy), strict=True))


def test_masked_truncated_samples_do_not_train(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """With truncated samples masked, their scores change neither loss nor gradient."""
    saved, results = parameters_of(policy), []
    for score in (0.0, 100.0):
        reset(policy, saved)
        rollouts = [replace(one, score=score) if one.rollout.truncated else one for one in make_rollouts()]
        learner = learner_of(policy, PpoConfig(epochs=1, minibatches=1), rewards=RewardsConfig(mask_truncated=True))
        _, stats = learner.learn(rollouts, 0, StepControls(1.0, 0.05, 0.0), StepTimer())
        results.append((stats.policy_loss, stats.value_loss, stats.grad_norm))
    assert results[0] == results[1]


def test_kl_in_the_loss_pulls_to_the_reference(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """With equal scores and a large coefficient only the penalty acts: the logprobs move towards the reference's."""
    rollouts = [replace(scored, score=0.0) for scored in make_rollouts()]
    learner = learner_of(
        policy, PpoConfig(epochs=1, minibatches=1, value_coefficient=0), kl=KlConfig(placement="loss", estimator="k2")
    )
    before, stats = learner.learn(rollouts, 0, StepControls(1.0, 10.0, 0.0), StepTimer())
    after, _ = learner.learn(rollouts, 1, StepControls(1e-9, 10.0, 0.0), StepTimer())
    mask = before.loss_mask

    def distance(logprobs: torch.Tensor) -> float:
        return float((logprobs - before.ref_logprobs)[mask].square().mean())

    assert stats.kl_loss > 0
    assert distance(after.old_logprobs) < distance(before.old_logprobs)


def test_the_gap_to_the_sampler_is_measured_on_tokens_of_the_same_weights(
    policy: PolicyWithValue, make_rollouts: Make
) -> None:
    rollouts = make_rollouts()
    batch, _ = learner_of(policy).learn(rollouts, 0, StepControls(1.0, 0.05, 0.0), StepTimer())
    difference = (batch.old_logprobs - batch.sampler_logprobs).abs()
    of_all = difference[batch.responses.response_mask]
    versions = PolicyVersions()
    versions.updated(0)
    versions.updated(1)
    figures = measure_off_policy(batch, rollouts, versions)
    assert figures["sampler/gap_mean"] == pytest.approx(float(of_all.mean()), rel=1e-5)
    assert figures["sampler/gap_max"] == pytest.approx(float(of_all.max()), rel=1e-5)
    # The first token of each is two versions old.
    for one in rollouts:
        one.rollout.versions[0] = -1
    figures = measure_off_policy(batch, rollouts, versions)
    later = difference[:, 1:][batch.responses.response_mask[:, 1:]]
    assert figures["sampler/gap_mean"] == pytest.approx(float(later.mean()), rel=1e-5)
    assert figures["sampler/divergence_mean"] == pytest.approx(float(of_all.mean()), rel=1e-5)
    assert figures["sampler/staleness_max"] == 2
    assert figures["sampler/staleness_mean"] == pytest.approx(2 * len(rollouts) / len(of_all))
    # Where sequences go on with the keys of older weights, no later token is of these alone; the second sample's are.
    rollouts[1].rollout.versions[0] = 1
    kept = measure_off_policy(batch, rollouts, versions, keeps=True)
    second = difference[1][batch.responses.response_mask[1]]
    assert kept["sampler/gap_mean"] == pytest.approx(float(second.mean()), rel=1e-5)
    assert kept["sampler/gap_max"] == pytest.approx(float(second.max()), rel=1e-5)
    # Without a token of the same weights there is no gap to tell, only a divergence.
    versions.updated(2)
    assert not {"sampler/gap_mean", "sampler/gap_max"} & measure_off_policy(batch, rollouts, versions).keys()


def observed(one: ScoredRollout, at: int, tokens: list[int]) -> ScoredRollout:
    """The rollout with an environment's tokens put in before position `at`."""

    def put(values: np.ndarray) -> np.ndarray:
        return np.insert(values, [at] * len(tokens), 0).astype(values.dtype)

    rollout = one.rollout
    response = np.insert(rollout.response, [at] * len(tokens), tokens).astype(np.int32)
    mask = np.insert(rollout.action_mask, [at] * len(tokens), values=False)
    changed = replace(
        rollout,
        response=response,
        action_mask=mask,
        sampler_logprobs=put(rollout.sampler_logprobs),
        versions=put(rollout.versions),
        turns=np.insert(rollout.turns, [at] * len(tokens), -1),
        rewards=put(rollout.rewards),
    )
    return replace(one, rollout=changed, ref_logprobs=np.insert(one.ref_logprobs, [at] * len(tokens), -99.0))


def test_observations_are_read_and_never_trained_on(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """No loss, KL, advantage or gradient at an environment's tokens; but what follows is conditioned on them."""
    plain = [one for one in make_rollouts(12) if len(one.rollout.response) >= 3]
    rollouts = [observed(one, 2, [41, 42, 43]) for one in plain]
    batch, _ = learner_of(policy).learn(rollouts, 0, StepControls(1e-9, 0.05, 0.0), StepTimer())
    holes = batch.responses.response_mask & ~batch.responses.action_mask
    assert int(holes.sum()) == 3 * len(rollouts)
    for values in (batch.old_logprobs, batch.ref_logprobs, batch.old_values, batch.advantages, batch.returns):
        assert values[holes].abs().sum() == 0
    assert not batch.loss_mask[holes].any()
    of_actions = (batch.old_logprobs - batch.ref_logprobs)[batch.responses.action_mask]
    assert batch.mean_kl == pytest.approx(float(of_actions.sum()) / len(rollouts), rel=1e-5)
    # Logprobs of later actions are those of the whole text.
    for row, one in enumerate(rollouts):
        tokens = torch.from_numpy(one.rollout.tokens).long()
        with torch.no_grad():
            logits = policy.model(tokens.unsqueeze(0)).logits[0].float() / 0.7
        last = len(tokens) - 1
        expected = torch.log_softmax(logits[last - 1], dim=-1)[tokens[last]]
        column = len(one.rollout.response) - 1
        torch.testing.assert_close(batch.old_logprobs[row, column], expected, atol=1e-4, rtol=1e-4)


def test_gradients_do_not_depend_on_what_is_observed_last(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """An observation behind the last action is text that nothing depends on."""
    saved, ends = parameters_of(policy), []
    for tokens in ([41, 42], [7, 9]):
        reset(policy, saved)
        rollouts = [observed(one, len(one.rollout.response), tokens) for one in make_rollouts()]
        learner_of(policy, PpoConfig(epochs=1, minibatches=1)).learn(
            rollouts, 0, StepControls(1.0, 0.05, 0.0), StepTimer()
        )
        ends.append(parameters_of(policy))
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


def test_importance_weights_scale_the_policy_loss(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """Sampler logprobs log(2) below the trainer's give every token weight 2, or the cap."""
    saved, losses = parameters_of(policy), []
    plain = PpoConfig(epochs=1, minibatches=1)
    raw = AdvantagesConfig(whiten=False)  # whitened advantages have a loss of 0 at ratio 1
    view, _ = learner_of(policy, plain).learn(make_rollouts(), 0, StepControls(1e-9, 0.05, 0.0), StepTimer())
    shifted = [
        replace(
            one, rollout=replace(one.rollout, sampler_logprobs=(view.old_logprobs[row, :length] - 0.6931472).numpy())
        )
        for row, one in enumerate(make_rollouts())
        if (length := len(one.rollout.response))
    ]
    for cap in (None, 1.5, 4.0):
        reset(policy, saved)
        ppo = PpoConfig(epochs=1, minibatches=1, importance_cap=cap)
        _, stats = learner_of(policy, ppo, advantages=raw).learn(shifted, 0, StepControls(1.0, 0.05, 0.0), StepTimer())
        losses.append(stats.policy_loss)
    assert losses[1] == pytest.approx(1.5 * losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(2.0 * losses[0], rel=1e-4)


def with_sampler(policy: PolicyWithValue, rollouts: list[ScoredRollout], shift: list[float]) -> list[ScoredRollout]:
    """Rollouts whose sampler's logprobs are `shift` [rollouts] below the trainer's, on every token."""
    view, _ = learner_of(policy).learn(rollouts, 0, StepControls(1e-9, 0.05, 0.0), StepTimer())
    made: list[ScoredRollout] = []
    for row, one in enumerate(rollouts):
        logprobs = view.old_logprobs[row, : len(one.rollout.response)] - shift[row]
        made.append(replace(one, rollout=replace(one.rollout, sampler_logprobs=logprobs.numpy())))
    return made


def test_tokens_that_sampler_and_trainer_disagree_about_do_not_train(
    policy: PolicyWithValue, make_rollouts: Make
) -> None:
    """A sequence outside the bounds changes nothing, whatever its score; figures count its tokens."""
    saved, results = parameters_of(policy), []
    ppo = PpoConfig(epochs=1, minibatches=1, ratio_mask=RatioMaskConfig(low=0.5, high=2.0, level="geometric"))
    for score in (0.0, 100.0):
        reset(policy, saved)
        rollouts = with_sampler(policy, make_rollouts(), [0.0, 1.0, 0.0, -1.0, 0.6, -0.6])
        reset(policy, saved)
        rollouts[1] = replace(rollouts[1], score=score)
        rollouts[3] = replace(rollouts[3], score=-score)
        batch, stats = learner_of(policy, ppo).learn(rollouts, 0, StepControls(1.0, 0.05, 0.0), StepTimer())
        results.append((stats.policy_loss, stats.value_loss, stats.grad_norm))
        lengths = [len(one.rollout.response) for one in rollouts]
        assert batch.mismatched == pytest.approx((lengths[1] + lengths[3]) / sum(lengths))
        assert batch.loss_mask.sum(dim=1).tolist() == [n if row not in {1, 3} else 0 for row, n in enumerate(lengths)]
    assert results[0] == results[1]


def test_the_learner_s_figures_do_not_depend_on_the_constant(policy: PolicyWithValue, make_rollouts: Make) -> None:
    saved, found = parameters_of(policy), []
    for changes in ({}, {"aggregation": "constant", "constant_tokens": 100}):
        reset(policy, saved)
        ppo = PpoConfig.model_validate({"epochs": 1, "minibatches": 2, "micro_batch_size": 2, **changes})
        _, stats = learner_of(policy, ppo).learn(make_rollouts(), 0, StepControls(0.0, 0.05, 0.0), StepTimer())
        found.append(stats.entropy)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_step_of_which_nothing_is_left_changes_no_weight(policy: PolicyWithValue, make_rollouts: Make) -> None:
    saved = parameters_of(policy)
    rollouts = with_sampler(policy, make_rollouts(), [3.0] * 6)
    reset(policy, saved)
    ppo = PpoConfig(epochs=1, minibatches=2, ratio_mask=RatioMaskConfig())
    batch, stats = learner_of(policy, ppo).learn(rollouts, 0, StepControls(1.0, 0.05, 0.0), StepTimer())
    assert batch.mismatched == 1.0
    assert (stats.grad_norm, stats.policy_loss, stats.explained_variance) == (0.0, 0.0, 0.0)


def test_learning_rate_warms_up_and_decays_linearly() -> None:
    config = OptimizerConfig(warmup_steps=2, final_fraction=0.1)
    factors = [learning_rate_at(step, 12, config) for step in range(13)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[7] == pytest.approx(0.55)
    assert factors[12] == pytest.approx(0.1)
    assert learning_rate_at(0, 10, OptimizerConfig()) == 1.0


def test_what_is_configured_of_the_optimizer_arrives(policy: PolicyWithValue) -> None:
    rules = ExperienceRules(RewardsConfig(), KlConfig(), build_estimator(AdvantagesConfig()), whiten=True)
    other = {"learning_rate": 1e-5, "value_learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.9}
    for values, rates, betas, epsilon, decay in (
        ({}, [2e-5, 2e-5], (0.9, 0.95), 1e-5, 0.0),
        ({**other, "epsilon": 1e-7, "weight_decay": 0.1}, [1e-5, 1e-3], (0.8, 0.9), 1e-7, 0.1),
    ):
        made = build_learner(policy, PpoConfig(), rules, OptimizerConfig.model_validate(values), seed=0)
        groups = made.optimizer.param_groups
        assert [group["lr"] for group in groups] == rates
        assert all((group["betas"], group["eps"], group["weight_decay"]) == (betas, epsilon, decay) for group in groups)
