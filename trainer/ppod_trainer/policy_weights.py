"""A policy's parameters as the bytes that travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ppod import PpodError
from ppod.client import WEIGHT_BLOCK_BYTES, ModelDescription, TensorDtype, TensorLayout, WeightTensor
from ppod.weight_changes import Bytes
from ppod_models.loading import DTYPES
from ppod_trainer.errors import WeightPushError

_CONVERTED_BLOCK_BYTES = 8 * WEIGHT_BLOCK_BYTES
"""What is converted at once: most tensors whole, because each call of torch lets go of the interpreter."""
_DEVICE_BLOCK_BYTES = 16 * WEIGHT_BLOCK_BYTES
"""What is copied from a device at once: each copy costs it, and the caller, some ten microseconds."""
_WIRE = {
    torch.float32: TensorDtype.FLOAT32,
    torch.bfloat16: TensorDtype.BFLOAT16,
    torch.float16: TensorDtype.FLOAT16,
}


class Describes(Protocol):
    """The client of a service that is given weights."""

    def describe(self) -> ModelDescription:
        """Ask what it serves."""
        ...


def wire_dtype(service: Describes, name: str) -> torch.dtype:
    """The data type that a service's weights travel in: its own.

    Raises:
        WeightPushError: the service, which messages call `name`, does not tell.
    """
    try:
        return DTYPES[service.describe().limits.dtype]
    except PpodError as error:
        raise WeightPushError(f"{name} does not tell which data type its weights have: {error}") from error


class PolicyTensors:
    """The parameters of a model, tied ones once, in the data type that travels.

    Args:
        model: its parameters are read when they are sent, so they must not change meanwhile.
        dtype: float32, bfloat16 or float16.

    Attributes:
        layout: what travels.
        device: the CUDA device that they are on; None: the CPU.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        named = list(model.named_parameters())
        self._places = _places(model)
        self._parameters = [parameter.detach() for _, parameter in named]
        # Not where they are written, by several threads: each operation of torch lets go of the interpreter, and waits
        # for the other threads to get it back, which for hundreds of tensors takes a third of the writing.
        self._bytes = [self._bytes_of(parameter) for parameter in self._parameters]
        self.device = next((one.device for one in self._parameters if one.device.type == "cuda"), None)
        self.layout = tuple(TensorLayout(name, _WIRE[dtype], tuple(parameter.shape)) for name, parameter in named)

    def are_of(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Whether they would be made alike again: `model` has these parameters, in the memory where they were."""
        # They keep that memory, so that no other tensor can have come to lie where one of them was.
        return dtype == self._dtype and _places(model) == self._places

    @property
    def in_place(self) -> bool:
        """Whether `tensors` copies nothing: they are on the CPU, in the data type that travels."""
        return all(data is not None for data in self._bytes)

    def write(self, index: int, memory: Bytes) -> Iterator[Bytes]:
        """Convert one tensor into `memory`; see `ppod.client.WriteBlocks`."""
        data = self._bytes[index]
        if data is not None:
            # By numpy: several tensors are written at once, and torch would start its own threads for each.
            for begin in range(0, len(data), WEIGHT_BLOCK_BYTES):
                block = memory[begin : begin + WEIGHT_BLOCK_BYTES]
                np.copyto(block, data[begin : begin + WEIGHT_BLOCK_BYTES])
                yield block
            return
        source = self._parameters[index].reshape(-1)
        on_cpu = source.device.type == "cpu"
        size = _CONVERTED_BLOCK_BYTES if on_cpu else _DEVICE_BLOCK_BYTES
        count = size // self._dtype.itemsize
        blocks = torch.from_numpy(memory).view(self._dtype).split(count)
        for number, (block, part) in enumerate(zip(blocks, source.split(count), strict=True)):
            # On a device in two steps: torch would convert on the CPU, many times slower.
            block.copy_(part if on_cpu else part.to(self._dtype))
            yield memory[number * size : (number + 1) * size]

    def tensors(self) -> list[WeightTensor]:
        """All tensors; those that have the data type already are sent from where they are."""
        return [
            WeightTensor(one.name, one.dtype, one.shape, self._data(index)) for index, one in enumerate(self.layout)
        ]

    def _data(self, index: int) -> memoryview:
        data = self._bytes[index]
        return bytes_of(self._parameters[index].to(self._dtype).cpu()) if data is None else data.data

    def _bytes_of(self, parameter: torch.Tensor) -> Bytes | None:
        """Where they can be copied from as they are; None where they must be converted first."""
        in_place = parameter.dtype == self._dtype and parameter.is_cpu and parameter.is_contiguous()
        return parameter.view(-1).view(torch.uint8).numpy() if in_place else None


class KnownPolicies:
    """Makes `PolicyTensors`, and keeps them while their model is there.

    Whoever pushes a policy again needs them again, and to make them takes as long as a tenth of its bytes take.
    """

    def __init__(self) -> None:
        # Weakly: a model that was gathered for one push is to go with it.
        self._known: WeakKeyDictionary[nn.Module, PolicyTensors] = WeakKeyDictionary()

    def tensors_of(self, model: nn.Module, dtype: torch.dtype) -> PolicyTensors:
        """What `PolicyTensors` would make now."""
        known = self._known.get(model)
        if known is None or not known.are_of(model, dtype):
            known = self._known[model] = PolicyTensors(model, dtype)
        return known


def _places(model: nn.Module) -> list[tuple[str, str, int, torch.dtype, torch.Size, tuple[int, ...]]]:
    """What parameters there are, and where."""
    return [
        (path, name, one.data_ptr(), one.dtype, one.shape, one.stride())
        for path, module in model.named_modules()
        # `named_parameters` tells the same in twice the time, and who pushes waits for it.
        for name, one in module._parameters.items()  # pyright: ignore[reportPrivateUsage]
        if one is not None
    ]


def wire_tensors(state: Mapping[str, torch.Tensor]) -> list[WeightTensor]:
    """Tensors by their names in a saved adapter, as float32 bytes."""
    tensors: list[WeightTensor] = []
    for name, tensor in state.items():
        data = bytes_of(tensor.detach().to("cpu", torch.float32))
        tensors.append(WeightTensor(name, TensorDtype.FLOAT32, tuple(tensor.shape), data))
    return tensors


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
