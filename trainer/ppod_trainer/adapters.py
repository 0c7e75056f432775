"""LoRA and QLoRA policies: an adapter that is trained on a base that stands still, and is its reference.

Source: Hu et al. 2021, "LoRA"; Dettmers et al. 2023, "QLoRA". PEFT does the work; this says what ppod needs of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ppod.client import LoraAdapter
from ppod_models.sources import name_elsewhere
from ppod_trainer.config import LoraConfig
from ppod_trainer.errors import TrainerError

_NAME = "default"


class PolicyAdapter:
    """LoRA layers in a policy's model, and what the model is with and without them.

    Args:
        model: the base; its layers are wrapped in place and its own parameters stand still.
        config: which layers, and how.
        seed: of what the adapter begins with.

    Raises:
        TrainerError: no layer is called like that, or one is not linear, or is the output layer.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
        adapter = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - PEFT's own kernels take any number
            use_rslora=config.rank_stabilized,
            target_modules=list(config.target_modules) or _linear_layers(model),
            # With dropout the ratio of new to old probabilities would be noise.
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            self.peft = cast(PeftModel, get_peft_model(model, adapter, adapter_name=_NAME))
        except ValueError as error:
            raise TrainerError(f"policy.lora: {error}") from error
        # PEFT turns to training mode, which would turn dropout of the base on.
        self.peft.eval()
        self._config = config
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        for name, layer in layers.items():
            # PEFT also adapts embeddings, GPT-2's transposed layers, and experts that are stacked in one parameter: of
            # some models wherever a layer is called as they were in older checkpoints.
            if _NAME not in layer.lora_A or not isinstance(layer.get_base_layer(), nn.Linear):
                raise TrainerError(
                    f"policy.lora.target_modules: {name} is no linear layer; name linear layers alone, such as q_proj"
                )
            if layer is model.get_output_embeddings():
                # Logprobs are taken with its weights, without what an adapter adds to them.
                raise TrainerError(
                    f"policy.lora.target_modules: {name} is the output layer, on which an adapter would not learn; "
                    "leave it out"
                )
        _begin(layers.values(), seed)
        self._scalings = {name: float(module.scaling[_NAME]) for name, module in layers.items()}

    @property
    def description(self) -> LoraAdapter:
        """What the adapter is, for a service that merges it."""
        return LoraAdapter(self._config.rank, self._config.alpha, tuple(self._scalings), self._config.rank_stabilized)

    def base(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of the adapted model's parameters those of the base, by the names that they have without an adapter."""
        return {
            name.replace(".base_layer.", "."): tensor for name, tensor in parameters.items() if ".lora_" not in name
        }

    def merged(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The policy as whole weights: W + scaling * B @ A where it is adapted, in float32 and then W's dtype."""
        whole = self.base(parameters)
        for layer, scaling in self._scalings.items():
            a, b = (parameters[f"{layer}.lora_{part}.{_NAME}.weight"].float() for part in "AB")
            weight = whole[f"{layer}.weight"]
            whole[f"{layer}.weight"] = (weight.float() + scaling * (b @ a)).to(weight.dtype)
        return whole

    def saved(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of the adapted model's parameters those of the adapter, by the names that PEFT saves them under."""
        return {
            f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous()
            for name, tensor in parameters.items()
            if ".lora_" in name
        }

    def save(self, directory: Path, tensors: Mapping[str, torch.Tensor], base: str) -> None:
        """Write what `saved` gave as PEFT loads it, with the base, whose source `base` is, or onto it."""
        config = self.peft.peft_config[_NAME]
        config.base_model_name_or_path, config.revision = name_elsewhere(base)
        config.save_pretrained(str(directory))
        save_file(dict(tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """All but the output layer. PEFT's "all-linear" takes experts in as well, which are stacked in one parameter."""
    output = model.get_output_embeddings()
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output]
    if not found:
        raise TrainerError("policy.lora: the model has no linear layers that an adapter could change")
    return found


@torch.no_grad()
def _begin(layers: Iterable[LoraLayer], seed: int) -> None:
    """Initialise as PEFT does, but from a seed, on the CPU: the same on every device and for every number of ranks.

    On a base without weights, which is on the meta device, PEFT has put the adapter there, too.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        a, b = (cast(nn.Linear, part[_NAME]) for part in (layer.lora_A, layer.lora_B))
        for part in (a, b):
            if part.weight.is_meta:
                part.to_empty(device="cpu")
        drawn = torch.empty(a.weight.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        a.weight.copy_(drawn)
        nn.init.zeros_(b.weight)
