"""A LoRA adapter for the tiny model, random and large enough to change every logprob."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from support.tiny_model import build_model


def build_adapted_model(*, seed: int = 0, target_modules: tuple[str, ...] = ("q_proj", "down_proj")) -> PeftModel:
    """The tiny model with random LoRA matrices; both of them, because PEFT starts with one at zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(target_modules), task_type="CAUSAL_LM")
    # Untied, because PEFT warns of an adapter on a tied output layer, which one test needs.
    tied = "lm_head" not in target_modules
    model = get_peft_model(build_model(tied=tied), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_tiny_adapter(directory: Path, *, seed: int = 0, target_modules: tuple[str, ...] = ("q_proj",)) -> Path:
    """Save an adapter as PEFT does; returns its directory."""
    build_adapted_model(seed=seed, target_modules=target_modules).save_pretrained(
        directory, save_embedding_layers=False
    )
    return directory
