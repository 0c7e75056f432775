"""One update of TRL 1.0.0's PPOTrainer, recorded by tests/benchmarks/beside_trl/record_update.py, against ours.

From the same weights and tokens both must come to the same logprobs, KL, rewards, advantages, returns, losses,
gradients and, step by step, weights, to 1e-5. Where the two differ, they do so by definition:

1. Where the score lands. TRL pays it one position behind the last token of a response that ended early, where there is
   padding, and trains a value there; where there is no room, and here always, on the last token. With `ended` it is
   shown that ours are TRL's numbers once the mask is one position longer, and that they are others with our own.
2. The value loss of TRL is a mean over those longer masks, the policy loss over the responses.
3. approx_kl. TRL's is the mean of d^2 / 2 over all positions, padding included; ours is k3 over response tokens.
4. Temperature. TRL divides by temperature + 1e-7.
5. The critic. TRL's value model has a trunk of its own; here each side's model is run by itself.
6. The gradient. TRL's loop does not clip its norm; here it is compared before ours is clipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ppod_trainer.advantages import gae
from ppod_trainer.algorithms import build_estimator
from ppod_trainer.config import AdvantagesConfig, KlConfig, PpoConfig, RewardsConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.experience import ExperienceRules, PolicyView, PpoBatch, build_ppo_batch
from ppod_trainer.kl import estimate_kl
from ppod_trainer.loss import LossRows, Objective, minibatch_loss
from ppod_trainer.masking import loss_weights, weighted_sum, whiten
from ppod_trainer.objective import ClipRange, policy_token_loss, value_token_loss
from ppod_trainer.policy import PolicyOutput, PolicyWithValue, ResponseBatch, build_response_batch
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn
from ppod_trainer.token_rewards import token_rewards

PROMPT_WIDTH = 4
GAMMA, LAM, KL, TEMPERATURE = 0.97, 0.9, 0.1, 0.8
CONTROLS = StepControls(rate_factor=1.0, kl_coefficient=KL, entropy_coefficient=0.0)
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def recorded() -> Arrays:
    with np.load(Path(__file__).parent / "trl_ppo_update.npz") as file:
        arrays = {name: file[name] for name in file.files}
    assert str(arrays["trl_version"]) == "1.0.0"
    return arrays


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found.detach(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def model_of(recorded: Arrays, part: str) -> PolicyWithValue:
    """One of TRL's models in the shape of ours; only the value model's head is read."""
    prefix = f"weights/{part}/"
    weights = {
        name.removeprefix(prefix): torch.from_numpy(a) for name, a in recorded.items() if name.startswith(prefix)
    }
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    made = PolicyWithValue(LlamaForCausalLM(config).eval(), compute_dtype=torch.float32)
    head = weights.pop("score.weight", None)
    missing, unexpected = made.model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, "tied to the embeddings"
    if head is not None:
        with torch.no_grad():
            made.value_head.weight.copy_(head)
    return made


def rollouts_of(recorded: Arrays) -> list[ScoredRollout]:
    made: list[ScoredRollout] = []
    for row, tokens in enumerate(recorded["full/query_responses"].astype(np.int32)):
        prompt, response = tokens[:PROMPT_WIDTH], tokens[PROMPT_WIDTH:]
        turn = Turn(
            response,
            recorded["full/logprobs"][row],
            np.ones(len(response), dtype=np.int64),
            truncated=True,
            hides_stop_token=False,
            temperature=TEMPERATURE,
        )
        rollout = Rollout.of_turn(Prompt(row, prompt[prompt != 0]), turn, seed=row)
        made.append(ScoredRollout(rollout, float(recorded["full/scores"][row]), recorded["full/ref_logprobs"][row]))
    return made


@torch.no_grad()
def experience_of(recorded: Arrays, policy: PolicyWithValue, critic: PolicyWithValue) -> PpoBatch:
    rollouts = rollouts_of(recorded)
    responses = build_response_batch(rollouts, torch.device("cpu"))
    output = critic(responses)
    view = PolicyView(policy(responses).logprobs, output.values, output.next_values)
    estimator = build_estimator(AdvantagesConfig(gamma=GAMMA, lam=LAM))
    rules = ExperienceRules(RewardsConfig(), KlConfig(coefficient=KL), estimator, whiten=True)
    return build_ppo_batch(rollouts, responses, view, rules, CONTROLS)


def test_experience_is_the_same(recorded: Arrays) -> None:
    policy, critic, reference = (model_of(recorded, part) for part in ("policy", "value", "reference"))
    batch = experience_of(recorded, policy, critic)
    close(batch.old_logprobs, recorded["full/logprobs"])
    with torch.no_grad():
        close(reference(batch.responses).logprobs, recorded["full/ref_logprobs"])
    close(batch.old_values, recorded["full/values"])
    close(batch.advantages, recorded["full/advantages"])
    close(batch.returns, recorded["full/returns"])
    kl = estimate_kl(batch.old_logprobs, batch.ref_logprobs, "k1")
    scores = torch.from_numpy(recorded["full/scores"])
    close(token_rewards(scores, kl, batch.loss_mask, KL), recorded["full/rewards"])
    assert float(batch.advantages.abs().max()) > 1, "there is something to compare"


def test_losses_gradients_and_steps_are_the_same(recorded: Arrays) -> None:
    """Two epochs of two minibatches, with TRL's optimizer, so that each step starts from what the one before made."""
    policy, critic = model_of(recorded, "policy"), model_of(recorded, "value")
    batch = experience_of(recorded, policy, critic)
    ppo = PpoConfig(clip=0.2, value_clip=0.2, value_coefficient=0.1)
    parameters = [*policy.model.parameters(), *critic.model.parameters(), critic.value_head.weight]
    adam = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    clipped = 0.0
    for number in range(4):
        seen = {
            key: recorded[f"full/{number}/{key}"] for key in ("new_logprobs", "vpred", "pg_loss", "vf_loss", "loss")
        }
        rows = torch.from_numpy(recorded[f"full/{number}/micro_batch_inds"])
        output = output_of(policy, critic, batch.responses.rows(rows))
        weights = torch.zeros_like(batch.old_logprobs)
        weights[rows] = loss_weights(batch.loss_mask[rows], ppo.aggregation)
        taken = LossRows.of(batch, rows, weights, output.logprobs.shape[1])
        loss, figures = minibatch_loss(output, taken, Objective(ppo, KlConfig(coefficient=KL)), CONTROLS)
        close(output.logprobs, seen["new_logprobs"])
        close(output.values, seen["vpred"])
        assert figures.policy == pytest.approx(float(seen["pg_loss"]), abs=1e-5)
        assert figures.value == pytest.approx(float(seen["vf_loss"]), abs=1e-5)
        close(loss, seen["loss"])
        moved = torch.from_numpy(seen["new_logprobs"]) - torch.from_numpy(recorded["full/logprobs"])[rows]
        assert figures.approx_kl == pytest.approx(float((moved.exp() - 1 - moved).mean()), abs=1e-5)
        loss.backward()
        if number == 0:
            compare_gradients(recorded, policy, critic)
            assert figures.ratio_error == pytest.approx(0.0, abs=1e-5)
        adam.step()
        adam.zero_grad()
        clipped += figures.clipped
    assert clipped > 0, "clipping is compared, too"


def output_of(policy: PolicyWithValue, critic: PolicyWithValue, responses: ResponseBatch) -> PolicyOutput:
    said, valued = policy(responses), critic(responses)
    return PolicyOutput(said.logprobs, said.entropy, valued.values, valued.next_values)


def compare_gradients(recorded: Arrays, policy: PolicyWithValue, critic: PolicyWithValue) -> None:
    parts: tuple[tuple[str, nn.Module], ...] = (("policy", policy.model), ("value_model", critic.model))
    compared = 0
    for part, model in parts:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            close(parameter.grad, recorded[f"full/gradients/{part}.{name}"])
            compared += 1
    assert critic.value_head.weight.grad is not None
    close(critic.value_head.weight.grad, recorded["full/gradients/value_model.score.weight"])
    assert compared + 1 == sum(name.startswith("full/gradients/") for name in recorded)


def test_responses_that_ended_differ_by_where_the_score_lands(recorded: Arrays) -> None:
    """Differences 1 and 2, on a run in which a response is shorter than the others."""
    one = {key: torch.from_numpy(recorded[f"ended/{key}"]) for key in ENDED}
    positions = torch.arange(one["responses"].shape[1])
    mask = positions[None] <= one["sequence_lengths"][:, None]
    longer = positions[None] <= one["sequence_lengths"][:, None] + 1
    assert not torch.equal(mask, longer)
    kl = torch.where(mask, estimate_kl(one["logprobs"], one["ref_logprobs"], "k1"), 0.0)

    rewards = token_rewards(one["scores"], kl, longer, KL)
    close(rewards, recorded["ended/rewards"])
    estimate = gae(rewards, one["values"], longer, gamma=GAMMA, lam=LAM)
    close(estimate.returns, recorded["ended/returns"])
    close(whiten(estimate.advantages, mask), recorded["ended/advantages"])
    compare_ended_losses(recorded, mask, longer)

    # Our own definition: the score is the last token's, and no value behind it is read or trained.
    own = token_rewards(one["scores"], kl, mask, KL)
    ended = ~(mask.all(dim=1))
    torch.testing.assert_close(own[~ended], rewards[~ended])
    assert not torch.allclose(own[ended], rewards[ended])
    torch.testing.assert_close(own.sum(dim=1), rewards.sum(dim=1))


ENDED = ("responses", "sequence_lengths", "logprobs", "ref_logprobs", "values", "scores", "advantages", "returns")


def compare_ended_losses(recorded: Arrays, mask: torch.Tensor, longer: torch.Tensor) -> None:
    for number in range(4):
        rows = recorded[f"ended/{number}/micro_batch_inds"]
        new, value = (torch.from_numpy(recorded[f"ended/{number}/{key}"]) for key in ("new_logprobs", "vpred"))
        old, values, advantages, returns = (
            torch.from_numpy(recorded[f"ended/{key}"][rows]) for key in ("logprobs", "values", "advantages", "returns")
        )
        losses = policy_token_loss(new - old, advantages, ClipRange(0.2, 0.2))
        close(weighted_sum(losses, loss_weights(mask[rows], "token_mean")), recorded[f"ended/{number}/pg_loss"])
        losses = value_token_loss(value, values, returns, 0.2)
        close(weighted_sum(losses, loss_weights(longer[rows], "token_mean")), recorded[f"ended/{number}/vf_loss"])
