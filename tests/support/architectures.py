"""Tiny random models of the architectures that transformers has."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.tiny_model import VOCAB_SIZE, build_tokenizer

WINDOW = 6
"""Of layers with sliding attention."""
_SIZES: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    # Heads of 32: smaller ones are too small for vLLM's attention on CPUs.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "state_size": 8,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 257,
    "eos_token_id": 256,
    # As GPT-2 and its like call them.
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 2,
    "n_positions": 256,
    "n_inner": 96,
}


def build_architecture(kind: str, **further: object) -> PreTrainedModel:
    """A model of a `model_type` with weights large enough that its distributions are far from uniform.

    `further` is more of its configuration. Where experts are chosen with a bias that is no parameter, it is none of 0.
    """
    torch.manual_seed(0)
    usual = CONFIG_MAPPING[kind]()
    known = usual.to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in known} | further
    if "q_lora_rank" in known:
        # Its heads have a size of their own.
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if known.get("layer_types"):
        # Each kind of layer in turn.
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = [kinds[index % len(kinds)] for index in range(4)]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.05:
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.linspace(0.3, -0.2, len(buffer)))
    return model


def save_architecture(directory: Path, kind: str) -> Path:
    """Save such a model and a tokenizer; returns the directory."""
    build_architecture(kind).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory
