"""A LoRA adapter of PEFT's as the bytes that travel."""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from ppod.client import LoraAdapter, WeightTensor
from ppod_trainer.policy_weights import wire_tensors


def adapter_tensors(model: PeftModel, adapter_name: str) -> tuple[LoraAdapter, list[WeightTensor]]:
    """An adapter of linear layers, of one rank and one alpha, float32, named as PEFT names them in a saved one."""
    config = cast(LoraConfig, model.peft_config[adapter_name])
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    layers = dict.fromkeys(name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in state)
    return LoraAdapter(config.r, config.lora_alpha, tuple(layers), bool(config.use_rslora)), wire_tensors(state)
