"""Critics: values of a trunk of their own, a start from a reward model, and what their gradients reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ppod_trainer.config import CriticConfig
from ppod_trainer.critic import load_value_model
from ppod_trainer.errors import TrainerError
from ppod_trainer.policy import PolicyWithValue, build_response_batch
from ppod_trainer.rollouts import ScoredRollout
from support.tiny_classifiers import save_decoder
from support.tiny_model import VOCAB_SIZE

CPU = torch.device("cpu")
Make = Callable[..., list[ScoredRollout]]


def policy_of(model: PreTrainedModel, **critic: object) -> PolicyWithValue:
    return PolicyWithValue(model, compute_dtype=torch.float32, **critic)  # type: ignore[arg-type]


def load(path: Path, vocab_size: int = VOCAB_SIZE):
    return load_value_model(path, device=CPU, attention="sdpa", vocab_size=vocab_size)


def moved(parameters: list[nn.Parameter]) -> list[bool]:
    return [parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters]


def test_a_critic_from_a_reward_model_tells_its_score_of_every_prefix(
    model: PreTrainedModel, make_rollouts: Make, tmp_path: Path
) -> None:
    path = save_decoder(tmp_path, seed=3)
    classifier = AutoModelForSequenceClassification.from_pretrained(path)
    policy, rollouts = policy_of(model, value_model=load(path)), make_rollouts()
    with torch.no_grad():
        output = policy(build_response_batch(rollouts, CPU))
        for row, scored in enumerate(rollouts):
            tokens = torch.from_numpy(scored.rollout.tokens).long()
            start = len(scored.rollout.prompt.token_ids)
            scores = [float(classifier(tokens[None, :end]).logits) for end in range(start, len(tokens) + 1)]
            values = [*output.values[row, : len(scored.rollout.response)].tolist(), float(output.next_values[row])]
            assert values == pytest.approx(scores, abs=2e-5)


def test_a_critic_from_a_language_model_begins_at_zero(
    model: PreTrainedModel, tiny_model_dir: Path, make_rollouts: Make
) -> None:
    policy = policy_of(model, value_model=load(tiny_model_dir))
    assert policy(build_response_batch(make_rollouts(), CPU)).values.abs().sum() == 0
    assert policy.value_trunk is not None
    assert len(policy.critic_parameters()) == len(list(policy.value_trunk.parameters())) + 2


def test_a_value_model_s_loss_never_reaches_the_policy(
    model: PreTrainedModel, make_rollouts: Make, tmp_path: Path
) -> None:
    policy = policy_of(model, value_model=load(save_decoder(tmp_path)))
    policy(build_response_batch(make_rollouts(), CPU)).values.sum().backward()
    assert not any(moved(policy.policy_parameters()))
    assert all(moved(policy.critic_parameters()))


@pytest.mark.parametrize("how", ["shared", "detached", "values only"])
def test_a_head_s_loss_reaches_the_trunk_unless_it_is_kept_from_it(
    model: PreTrainedModel, make_rollouts: Make, how: str
) -> None:
    policy = policy_of(model, detach_values=how == "detached")
    nn.init.normal_(policy.value_head.weight)
    output = policy(build_response_batch(make_rollouts(), CPU), values_only=how == "values only")
    output.values.sum().backward()
    assert all(moved(policy.critic_parameters()))
    # The output layer is tied to the embedding, so that even its gradient is the trunk's.
    assert all(moved(policy.policy_parameters())) == (how == "shared")
    assert any(moved(policy.policy_parameters())) == (how == "shared")
    assert output.logprobs.requires_grad == (how != "values only")


def test_values_only_changes_no_number(policy: PolicyWithValue, make_rollouts: Make) -> None:
    batch = build_response_batch(make_rollouts(), CPU)
    whole, alone = policy(batch), policy(batch, values_only=True)
    assert torch.equal(whole.values, alone.values)
    assert torch.equal(whole.logprobs, alone.logprobs)


def test_a_critic_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_decoder(tmp_path / "one")
    with pytest.raises(TrainerError, match=f"reads {VOCAB_SIZE} token ids, the policy 300"):
        load(path, vocab_size=300)
    with pytest.raises(TrainerError, match="one label"):
        load(save_decoder(tmp_path / "two", labels=2))


def test_configurations_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="has no trunk of its own"):
        CriticConfig(kind="head", source="packaged:smollm2-135m-instruct")
    with pytest.raises(ValueError, match="never reaches the policy"):
        CriticConfig(kind="model", detach=True)
