"""A model's parameters as the tensors that a WeightClient sends."""

from __future__ import annotations

import torch
from torch import nn

from ppod.client import TensorDtype, WeightTensor

_WIRE = {torch.float32: TensorDtype.FLOAT32, torch.bfloat16: TensorDtype.BFLOAT16, torch.float16: TensorDtype.FLOAT16}


def weight_tensors(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[WeightTensor]:
    """All named parameters, converted to `dtype`."""
    return [weight_tensor(name, parameter.detach().to(dtype)) for name, parameter in model.named_parameters()]


def weight_tensor(name: str, tensor: torch.Tensor) -> WeightTensor:
    """One tensor; its bytes are copied."""
    data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return WeightTensor(name, _WIRE[tensor.dtype], tuple(tensor.shape), data)
