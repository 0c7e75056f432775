"""What an update must not depend on: padding, the order of samples, how a minibatch is cut, a shift of all scores, and
minibatches of which nothing counts; and the figures of one that changes nothing, by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppod_models.padding import position_ids
from ppod_trainer.algorithms import build_estimator
from ppod_trainer.config import AdvantagesConfig, KlConfig, OptimizerConfig, PpoConfig, RewardsConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import ExperienceRules, PpoBatch
from ppod_trainer.learner import UpdateStats, build_learner
from ppod_trainer.loss import LossRows, Objective, minibatch_loss
from ppod_trainer.masking import loss_weights
from ppod_trainer.metrics import StepTimer
from ppod_trainer.policy import PolicyWithValue, ResponseBatch
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.step_figures import update_figures

Make = Callable[..., list[ScoredRollout]]
STILL = StepControls(rate_factor=0.0, kl_coefficient=0.05, entropy_coefficient=0.01)
"""With a learning rate of 0 a step measures its gradient and changes nothing."""

few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def learn(
    policy: PolicyWithValue, rollouts: list[ScoredRollout], ppo: PpoConfig, advantages: AdvantagesConfig | None = None
) -> tuple[PpoBatch, UpdateStats]:
    chosen = advantages or AdvantagesConfig()
    rules = ExperienceRules(RewardsConfig(), KlConfig(), build_estimator(chosen), whiten=chosen.whiten)
    learner = build_learner(policy, ppo, rules, OptimizerConfig(), seed=0)
    return learner.learn(rollouts, 0, STILL, StepTimer())


def measured(stats: UpdateStats) -> list[float]:
    return [stats.grad_norm, stats.policy_loss, stats.value_loss, stats.entropy]


def padded(batch: ResponseBatch, left: int, right: int, token: int) -> ResponseBatch:
    """The same batch with more columns of padding on either side, which hold any token."""

    def wider(values: torch.Tensor, before: int, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(values, (before, right), value=fill)

    mask = wider(batch.attention_mask, left, 0)
    return ResponseBatch(
        input_ids=wider(batch.input_ids, left, token),
        attention_mask=mask,
        position_ids=position_ids(mask),
        responses=wider(batch.responses, 0, token),
        response_mask=wider(batch.response_mask, 0, 0).bool(),
        action_mask=wider(batch.action_mask, 0, 0).bool(),
        temperature=batch.temperature,
    )


def gradients(policy: PolicyWithValue, responses: ResponseBatch, batch: PpoBatch) -> list[torch.Tensor]:
    output = policy(responses)
    extra = output.logprobs.shape[1] - batch.loss_mask.shape[1]
    rows = LossRows.of(
        batch, torch.arange(len(batch.loss_mask)), loss_weights(batch.loss_mask, "token_mean"), output.logprobs.shape[1]
    )
    # What the batch has no column for is padding.
    wide = replace(
        rows,
        **{
            name: torch.nn.functional.pad(getattr(rows, name), (0, extra))
            for name in (
                "weights",
                "old_logprobs",
                "sampler_logprobs",
                "ref_logprobs",
                "old_values",
                "advantages",
                "returns",
            )
        },
    )
    loss, _ = minibatch_loss(output, wide, Objective(PpoConfig(), KlConfig()), STILL)
    found = torch.autograd.grad(loss, list(policy.parameters()))
    return list(found)


@given(left=st.integers(0, 4), right=st.integers(0, 4), token=st.integers(0, 300))
@few
def test_padding_changes_no_gradient(
    policy: PolicyWithValue, make_rollouts: Make, left: int, right: int, token: int
) -> None:
    batch, _ = learn(policy, make_rollouts(), PpoConfig(epochs=1, minibatches=1))
    plain = gradients(policy, batch.responses, batch)
    more = gradients(policy, padded(batch.responses, left, right, token), batch)
    for one, other in zip(plain, more, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert sum(float(one.abs().sum()) for one in plain) > 1


@given(order=st.permutations(range(6)))
@few
def test_order_of_the_samples_changes_nothing(policy: PolicyWithValue, make_rollouts: Make, order: list[int]) -> None:
    rollouts = make_rollouts()
    ppo = PpoConfig(epochs=1, minibatches=1)
    _, plain = learn(policy, rollouts, ppo)
    _, shuffled = learn(policy, [rollouts[row] for row in order], ppo)
    assert measured(shuffled) == pytest.approx(measured(plain), rel=1e-4, abs=1e-6)


@given(
    size=st.integers(1, 6),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "constant"]),
    ratio=st.sampled_from(["token", "sequence", "sequence_token"]),
)
@few
def test_a_minibatch_may_be_cut_anywhere(
    policy: PolicyWithValue, make_rollouts: Make, size: int, aggregation: str, ratio: str
) -> None:
    values: dict[str, object] = {"epochs": 1, "minibatches": 1, "aggregation": aggregation, "ratio": ratio}
    if aggregation == "constant":
        values["constant_tokens"] = 8
    _, whole = learn(policy, make_rollouts(), PpoConfig.model_validate(values))
    _, cut = learn(policy, make_rollouts(), PpoConfig.model_validate({**values, "micro_batch_size": size}))
    assert measured(cut) == pytest.approx(measured(whole), rel=1e-4, abs=1e-6)


@given(shift=st.floats(-20, 20), kind=st.sampled_from(["monte_carlo", "sequence", "gae"]))
@few
def test_whitened_advantages_do_not_see_a_shift_of_all_scores(
    policy: PolicyWithValue, make_rollouts: Make, shift: float, kind: str
) -> None:
    """Without discount, and with lambda 1, a shift of the scores is a shift of every token's advantage."""
    advantages = AdvantagesConfig.model_validate({"kind": kind, **({"lam": 1.0} if kind == "gae" else {})})
    rollouts = make_rollouts()
    moved = [replace(one, score=one.score + shift) for one in rollouts]
    ppo = PpoConfig(epochs=1, minibatches=1)
    plain, _ = learn(policy, rollouts, ppo, advantages)
    shifted, _ = learn(policy, moved, ppo, advantages)
    torch.testing.assert_close(shifted.advantages, plain.advantages, atol=1e-4, rtol=1e-4)
    mask = plain.loss_mask
    torch.testing.assert_close(shifted.returns[mask], plain.returns[mask] + shift, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("epochs", [1, 3])
def test_figures_are_means_over_the_minibatches(policy: PolicyWithValue, make_rollouts: Make, epochs: int) -> None:
    """Of a policy that stands still every epoch's are alike: ratios are 1, and values those before the update."""
    raw, kl = AdvantagesConfig(whiten=False), KlConfig(placement="loss", estimator="k2")
    rules = ExperienceRules(RewardsConfig(), kl, build_estimator(raw), whiten=False)
    ppo = PpoConfig(epochs=epochs, minibatches=1)
    learner = build_learner(policy, ppo, rules, OptimizerConfig(), seed=0)
    batch, stats = learner.learn(make_rollouts(), 0, STILL, StepTimer())
    output, weights = policy(batch.responses), loss_weights(batch.loss_mask, "token_mean")
    rows = LossRows.of(batch, torch.arange(len(weights)), weights, weights.shape[1])
    loss, _ = minibatch_loss(output, rows, Objective(ppo, kl), STILL)
    norm = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(policy.parameters()))]).norm()
    terms = {
        "policy_loss": -batch.advantages,
        "value_loss": (batch.old_values - batch.returns).square() / 2,
        "kl_loss": (batch.old_logprobs - batch.ref_logprobs).square() / 2,
        "entropy": output.entropy.detach(),
    }
    expected = {name: float(values[batch.loss_mask].mean()) for name, values in terms.items()}
    expected |= {"grad_norm": float(norm), "clip_fraction": 0, "dual_clip_fraction": 0, "ratio_bounded": 0}
    assert {name: getattr(stats, name) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert stats.optimizer_steps == epochs


def test_a_minibatch_of_which_nothing_is_left_is_no_step_and_no_figure(
    policy: PolicyWithValue, make_rollouts: Make
) -> None:
    """Six minibatches of a sample each: one that counts; then none, with the momentum of the step before."""
    rollouts = [
        replace(one, rollout=replace(one.rollout, truncated=number > 0)) for number, one in enumerate(make_rollouts())
    ]
    saved = [parameter.detach().clone() for parameter in policy.parameters()]
    rules = ExperienceRules(RewardsConfig(mask_truncated=True), KlConfig(), build_estimator(AdvantagesConfig()), True)
    controls, found = StepControls(1.0, 0.05, 0.0), []
    for minibatches in (1, 6):
        with torch.no_grad():
            for parameter, value in zip(policy.parameters(), saved, strict=True):
                parameter.copy_(value)
        learner = build_learner(policy, PpoConfig(epochs=1, minibatches=minibatches), rules, OptimizerConfig(), seed=0)
        _, stats = learner.learn(rollouts, 0, controls, StepTimer())
        assert stats.optimizer_steps == 1
        found.append(measured(stats))
        learned = [parameter.detach().clone() for parameter in policy.parameters()]
        batch, stats = learner.learn(rollouts[1:], 1, controls, StepTimer())
        assert stats.optimizer_steps == 0
        # An entropy of 0 would be a collapse.
        assert "policy/entropy" not in update_figures(batch, stats)
        assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), learned, strict=True))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-7)
