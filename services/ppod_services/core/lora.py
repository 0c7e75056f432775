"""LoRA adapters (Hu et al., 2021) as weights of a model's layers: their names, shapes, and what merging them gives."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch

from ppod.errors import InvalidArgument
from ppod_services.core.weight_manifest import LoraAdapter


def adapter_shapes(
    adapter: LoraAdapter, weights: Mapping[str, tuple[int, ...]], linear: Set[str]
) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of an adapter's tensors.

    Args:
        adapter: what comes.
        weights: names and shapes of the model's weights.
        linear: names of its linear layers that have weights of their own.

    Raises:
        InvalidArgument: it changes something else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapter.target_modules:
        if layer not in linear:
            expected = "a linear layer of the model with weights of its own"
            raise InvalidArgument("manifest.adapter.target_modules", layer, expected)
        out_size, in_size = weights[f"{layer}.weight"]
        name_a, name_b = adapter_names(layer)
        shapes[name_a] = (adapter.rank, in_size)
        shapes[name_b] = (out_size, adapter.rank)
    return shapes


def merge_layer(
    base: torch.Tensor, adapter: LoraAdapter, tensors: Mapping[str, torch.Tensor], layer: str
) -> torch.Tensor:
    """The weight [out, in] of a layer with its change, in the base's data type; computed in float32."""
    matrix_a, matrix_b = (tensors[part].to(base.device, torch.float32) for part in adapter_names(layer))
    return torch.addmm(base.float(), matrix_b, matrix_a, alpha=adapter.scaling).to(base.dtype)


def adapter_names(layer: str) -> tuple[str, str]:
    """Names of A and B of a layer, as PEFT has them in a state dict."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"
