"""Tiny models that are built in another way than Llama."""

from __future__ import annotations

import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from support.tiny_model import VOCAB_SIZE


def build_mixture() -> MixtralForCausalLM:
    """A mixture of experts, whose weights are stacked in one parameter for each kind of layer."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        # Heads of 32, and multiples of 32: smaller ones are too small for vLLM on CPUs.
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=128,
        pad_token_id=257,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


def build_biased_mixture() -> Glm4MoeForCausalLM:
    """A mixture that chooses its experts with a bias, which is no parameter."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=128,
        pad_token_id=257,
        initializer_range=0.2,
    )
    model = Glm4MoeForCausalLM(config).eval()
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    return model


def build_sinking_mixture() -> GptOssForCausalLM:
    """A mixture with attention sinks, whose weights vLLM copies into its parameters by hand."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        max_position_embeddings=128,
        pad_token_id=257,
        initializer_range=0.2,
    )
    return GptOssForCausalLM(config).eval()


def build_gpt2() -> GPT2LMHeadModel:
    """A model whose layers' weights are transposed, as convolutions of width 1."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2, n_positions=128, pad_token_id=257)
    return GPT2LMHeadModel(config).eval()
