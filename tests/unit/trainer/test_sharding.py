"""Hollow copies, and activations that are computed again; dividing among ranks has tests with real ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ppod_trainer.policy import PolicyWithValue, build_response_batch
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.sharding import checkpoint_layers, decoder_layers, fill, gather_parameters, hollow_copy


def test_layers_are_the_repeated_blocks(policy: PolicyWithValue) -> None:
    assert [type(layer).__name__ for layer in decoder_layers(policy)] == ["LlamaDecoderLayer"] * 2


def test_a_hollow_copy_holds_no_weights_and_can_be_filled_again_and_again(model: PreTrainedModel) -> None:
    hollow = hollow_copy(model)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    for _ in range(2):
        filled = fill(hollow, dict(gather_parameters(model, torch.float32)))
        assert all(
            torch.equal(mine, theirs) for mine, theirs in zip(filled.parameters(), model.parameters(), strict=True)
        )
        assert filled.get_output_embeddings().weight is filled.get_input_embeddings().weight, "ties stay"
        assert filled.get_input_embeddings().weight is not model.get_input_embeddings().weight
        ids = torch.arange(5).unsqueeze(0)
        assert torch.equal(filled(ids).logits, model(ids).logits)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    halves = fill(hollow, dict(gather_parameters(model, torch.bfloat16)))
    assert {parameter.dtype for parameter in halves.parameters()} == {torch.bfloat16}


def test_checkpointed_layers_keep_less_and_have_the_same_gradients(
    policy: PolicyWithValue, make_rollouts: Callable[..., list[ScoredRollout]]
) -> None:
    batch = build_response_batch(make_rollouts(), torch.device("cpu"))

    def kept_bytes() -> int:
        """Bytes that the forward pass keeps for the backward pass, besides weights."""
        kept: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in policy.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        policy.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = policy(batch)
        (output.logprobs.sum() + output.values.sum()).backward()
        return sum(kept.values())

    before = kept_bytes()
    gradients = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
    checkpoint_layers(policy)
    assert kept_bytes() < before / 3
    again = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, gradients, strict=True))
