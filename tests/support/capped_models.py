"""Tiny random models that change their logits after the output layer, each by enough to matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from ppod_models.logit_transforms import LogitTransform
from support.tiny_model import MAX_TOKENS, VOCAB_SIZE, build_tokenizer

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


def gemma2() -> PreTrainedModel:
    """Caps its logits, and those of attention: sdpa does not do that."""
    config = Gemma2Config(**_SIZES, head_dim=32, sliding_window=8, final_logit_softcapping=4.0)
    return _random(Gemma2ForCausalLM, config)


def cohere() -> PreTrainedModel:
    """Multiplies."""
    return _random(CohereForCausalLM, CohereConfig(**_SIZES, logit_scale=0.25))


def cohere2() -> PreTrainedModel:
    """Multiplies, with windows in most layers."""
    return _random(Cohere2ForCausalLM, Cohere2Config(**_SIZES, logit_scale=0.5, sliding_window=8))


def granite() -> PreTrainedModel:
    """Divides."""
    return _random(GraniteForCausalLM, GraniteConfig(**_SIZES, logits_scaling=3.0))


def with_images() -> PreTrainedModel:
    """Changes nothing, but has a tower for images: what is said of its text is one level down in its configuration."""
    text = {**_SIZES, "head_dim": 32, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config={**vision, **image}, mm_tokens_per_image=1)
    return _random(Gemma3ForConditionalGeneration, config)


def _random(kind: Callable[..., PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config).eval()


BUILDS: Mapping[str, tuple[Callable[[], PreTrainedModel], LogitTransform]] = {
    "gemma2": (gemma2, LogitTransform(cap=4.0)),
    "cohere": (cohere, LogitTransform(0.25)),
    "cohere2": (cohere2, LogitTransform(0.5)),
    "granite": (granite, LogitTransform(1 / 3)),
}
"""By name: what makes the model, and what it does to its logits."""


def save_with_tokenizer(model: PreTrainedModel, directory: Path) -> Path:
    """Save such a model with a tokenizer; returns the directory."""
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory
