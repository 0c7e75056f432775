"""The padded, shifted, masked forward pass against one sequence at a time, done the slow and obvious way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ppod_trainer.errors import TrainerError
from ppod_trainer.policy import PolicyWithValue, build_response_batch
from ppod_trainer.rollouts import ScoredRollout

CPU = torch.device("cpu")
Make = Callable[..., list[ScoredRollout]]


def naive(policy: PolicyWithValue, scored: ScoredRollout, temperature: float) -> tuple[torch.Tensor, ...]:
    """Logprobs, entropy, values and next value of one response, without padding."""
    tokens = torch.from_numpy(scored.rollout.tokens).long()
    start = len(scored.rollout.prompt.token_ids)
    output = policy.model(tokens.unsqueeze(0), output_hidden_states=True)
    logprobs = torch.log_softmax(output.logits[0].float() / temperature, dim=-1)
    values = policy.value_head(output.hidden_states[-1][0]).squeeze(-1)
    chosen = torch.stack([logprobs[t - 1, tokens[t]] for t in range(start, len(tokens))])
    entropy = torch.stack([-(logprobs[t - 1].exp() * logprobs[t - 1]).sum() for t in range(start, len(tokens))])
    return chosen, entropy, values[start - 1 : -1], values[-1]


def test_batch_equals_single_sequences(policy: PolicyWithValue, make_rollouts: Make) -> None:
    rollouts = make_rollouts()
    batch = build_response_batch(rollouts, CPU)
    with torch.no_grad():
        output = policy(batch)
        for row, scored in enumerate(rollouts):
            logprobs, entropy, values, next_value = naive(policy, scored, 0.7)
            length = len(scored.rollout.response)
            torch.testing.assert_close(output.logprobs[row, :length], logprobs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.entropy[row, :length], entropy, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.values[row, :length], values, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.next_values[row], next_value, atol=1e-5, rtol=1e-5)
            for padded in (output.logprobs, output.entropy, output.values):
                assert padded[row, length:].abs().sum() == 0


def test_rows_cut_padding_and_change_nothing(policy: PolicyWithValue, make_rollouts: Make) -> None:
    rollouts = make_rollouts(8)
    batch = build_response_batch(rollouts, CPU)
    index = torch.tensor([5, 2])
    part = batch.rows(index)
    lengths = [len(rollouts[row].rollout.response) for row in (5, 2)]
    prompts = [len(rollouts[row].rollout.prompt.token_ids) for row in (5, 2)]
    assert part.responses.shape[1] == max(lengths)
    assert part.prompt_width == max(prompts)
    with torch.no_grad():
        whole, cut = policy(batch), policy(part)
    torch.testing.assert_close(whole.logprobs[index, : max(lengths)], cut.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.next_values[index], cut.next_values, atol=1e-5, rtol=1e-5)


def test_prompts_and_padding_have_no_logits_and_no_gradient(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """The loss of row 0 alone moves nothing that only other rows' tokens touch: their embeddings get no gradient."""
    rollouts = make_rollouts()
    batch = build_response_batch(rollouts, CPU)
    output = policy(batch)
    output.values[0].sum().backward()
    gradient = policy.model.get_input_embeddings().weight.grad
    assert gradient is not None
    touched = set(gradient.abs().sum(dim=1).nonzero().flatten().tolist())
    assert touched == set(rollouts[0].rollout.tokens[:-1].tolist())


def test_value_head_starts_at_zero(policy: PolicyWithValue, make_rollouts: Make) -> None:
    fresh = PolicyWithValue(policy.model, compute_dtype=torch.float32)
    assert fresh(build_response_batch(make_rollouts(), CPU)).values.abs().sum() == 0


def test_bfloat16_compute_keeps_float32_parameters(policy: PolicyWithValue, make_rollouts: Make) -> None:
    half = PolicyWithValue(policy.model, compute_dtype=torch.bfloat16)
    batch = build_response_batch(make_rollouts(), CPU)
    with torch.no_grad():
        exact, rounded = policy(batch), half(batch)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    difference = (exact.logprobs - rounded.logprobs).abs().max()
    assert 0 < float(difference) < 0.2
    assert rounded.logprobs.dtype == torch.float32


def test_dropout_is_off(policy: PolicyWithValue) -> None:
    assert not policy.model.training


def test_a_batch_has_one_temperature(policy: PolicyWithValue, make_rollouts: Make) -> None:
    """It comes with the samples: the same tokens at another temperature have other logprobs; two in one are refused."""
    rollouts = make_rollouts(2)
    warm = [replace(one, rollout=replace(one.rollout, temperature=1.3)) for one in rollouts]
    batch = build_response_batch(warm, CPU)
    assert batch.temperature == batch.rows(torch.tensor([1])).temperature == 1.3
    with torch.no_grad():
        expected, _, _, _ = naive(policy, warm[1], 1.3)
        found = policy(batch.rows(torch.tensor([1]))).logprobs[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TrainerError, match=r"samples of the temperatures \[0.7, 1.3\]; expected one"):
        build_response_batch([rollouts[0], warm[1]], CPU)
