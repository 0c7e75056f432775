"""A policy's parameters, and its adapter's, as the bytes that travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from ppod.client import LoraAdapter, TensorDtype, TensorLayout, WeightTensor
from ppod_trainer.errors import TrainerError

_WIRE = {
    torch.float32: TensorDtype.FLOAT32,
    torch.bfloat16: TensorDtype.BFLOAT16,
    torch.float16: TensorDtype.FLOAT16,
}


class PolicyTensors:
    """The parameters of a model, tied ones once, in the data type that travels.

    Args:
        model: its parameters are read when they are sent, so they must not change meanwhile.
        dtype: float32, bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        named = list(model.named_parameters())
        self._parameters = [parameter.detach().contiguous().view(-1) for _, parameter in named]
        self.layout = tuple(TensorLayout(name, _WIRE[dtype], tuple(parameter.shape)) for name, parameter in named)

    def write(self, index: int, first: int, memory: memoryview) -> None:
        """Convert elements of one tensor into `memory`; see `ppod.client.WriteElements`."""
        target = torch.frombuffer(memory, dtype=self._dtype)
        target.copy_(self._parameters[index][first : first + len(target)])

    def tensors(self) -> list[WeightTensor]:
        """All tensors; those that have the data type already are sent from where they are."""
        return [
            WeightTensor(one.name, one.dtype, one.shape, _bytes_of(flat.to("cpu", self._dtype)))
            for one, flat in zip(self.layout, self._parameters, strict=True)
        ]


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
    tensors: list[WeightTensor] = []
    layers: dict[str, None] = {}
    for name, tensor in state.items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise TrainerError(
                f"adapter {adapter_name!r} has {name}, only lora_A and lora_B of linear layers can be sent"
            )
        layers[layer] = None
        data = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
        tensors.append(WeightTensor(name, TensorDtype.FLOAT32, tuple(tensor.shape), _bytes_of(data)))
    return LoraAdapter(config.r, config.lora_alpha, tuple(layers), bool(config.use_rslora)), tensors


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


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
