"""A policy's parameters as the bytes that travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ppod.client import WEIGHT_BLOCK_BYTES, TensorDtype, TensorLayout, WeightTensor

_DEVICE_BLOCK_BYTES = 16 * WEIGHT_BLOCK_BYTES
"""What is copied from a device at once: each copy costs it, and the caller, some ten microseconds."""
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

    Attributes:
        layout: what travels.
        on_device: whether they are on a CUDA device.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        named = list(model.named_parameters())
        self._parameters = [parameter.detach().contiguous().view(-1) for _, parameter in named]
        self.on_device = any(parameter.device.type == "cuda" for parameter in self._parameters)
        self.layout = tuple(TensorLayout(name, _WIRE[dtype], tuple(parameter.shape)) for name, parameter in named)

    @property
    def in_place(self) -> bool:
        """Whether `tensors` copies nothing: they are on the CPU, in the data type that travels."""
        return all((one.device.type, one.dtype) == ("cpu", self._dtype) for one in self._parameters)

    def write(self, index: int, memory: memoryview) -> Iterator[memoryview]:
        """Convert one tensor into `memory`; see `ppod.client.WriteBlocks`."""
        source = self._parameters[index]
        if source.dtype == self._dtype and source.device.type == "cpu":
            # By numpy: several tensors are written at once, and torch would start its own threads for each.
            data, target = source.view(torch.uint8).numpy(), np.frombuffer(memory, np.uint8)
            for begin in range(0, len(data), WEIGHT_BLOCK_BYTES):
                block = data[begin : begin + WEIGHT_BLOCK_BYTES]
                # Hashed before the copy, which may go past the cache.
                yield block.data
                np.copyto(target[begin : begin + WEIGHT_BLOCK_BYTES], block)
            return
        first = 0
        size = WEIGHT_BLOCK_BYTES if source.device.type == "cpu" else _DEVICE_BLOCK_BYTES
        for begin in range(0, len(memory), size):
            block = memory[begin : begin + size]
            target = torch.frombuffer(block, dtype=self._dtype)
            part = source[first : first + len(target)]
            # On a device in two steps: torch would convert on the CPU, many times slower.
            target.copy_(part if part.device.type == "cpu" else part.to(self._dtype))
            first += len(target)
            yield block

    def tensors(self) -> list[WeightTensor]:
        """All tensors; those that have the data type already are sent from where they are."""
        return [
            WeightTensor(one.name, one.dtype, one.shape, bytes_of(flat.to(self._dtype).cpu()))
            for one, flat in zip(self.layout, self._parameters, strict=True)
        ]


def wire_tensors(state: Mapping[str, torch.Tensor]) -> list[WeightTensor]:
    """Tensors by their names in a saved adapter, as float32 bytes."""
    tensors: list[WeightTensor] = []
    for name, tensor in state.items():
        data = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
        tensors.append(WeightTensor(name, TensorDtype.FLOAT32, tuple(tensor.shape), bytes_of(data)))
    return tensors


def bytes_of(flat: torch.Tensor) -> memoryview:
    """The bytes of a flat CPU tensor."""
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
