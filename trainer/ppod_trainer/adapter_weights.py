"""A LoRA adapter of the policy as the bytes that travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from ppod.client import LoraAdapter, WeightTensor
from ppod_trainer.errors import TrainerError
from ppod_trainer.policy_weights import wire_tensors


def adapter_tensors(model: PeftModel, adapter_name: str) -> tuple[LoraAdapter, list[WeightTensor]]:
    """A LoRA adapter and its tensors, float32, named as PEFT names them in a saved adapter.

    Raises:
        TrainerError: it changes more than linear layers by one rank and one alpha, which cannot be sent.
    """
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig):
        raise TrainerError(f"adapter {adapter_name!r} is {config.peft_type}, only LoRA can be sent alone")
    _check_plain(adapter_name, config)
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    layers: dict[str, None] = {}
    for name in state:
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise TrainerError(
                f"adapter {adapter_name!r} has {name}, only lora_A and lora_B of linear layers can be sent"
            )
        layers[layer] = None
    adapter = LoraAdapter(config.r, config.lora_alpha, tuple(layers), bool(config.use_rslora))
    return adapter, wire_tensors(state)


def _check_plain(name: str, config: LoraConfig) -> None:
    """Refuse variants whose result is not W + scaling * B @ A with one scaling."""
    used: Sequence[tuple[str, object]] = (
        ("use_dora", config.use_dora),
        ("fan_in_fan_out", config.fan_in_fan_out),
        ("lora_bias", config.lora_bias),
        ("modules_to_save", config.modules_to_save),
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
        ("bias", config.bias != "none"),
    )
    for key, value in used:
        if value:
            raise TrainerError(f"adapter {name!r} uses {key}, which a push of the adapter alone cannot carry")
