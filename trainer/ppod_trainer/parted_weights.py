"""How each rank gets its part of a policy's weights, and no more: the rows that it keeps, out of mapped files.

transformers maps a checkpoint's files into memory and reads nothing of a tensor that it need not convert. So a model
is loaded in the dtype of its files; the policy is put together from float32 parameters on the meta device, which hold
nothing, and divided; then each parameter's rows are copied out of the mapped tensor. Where transformers has to convert
tensors as it loads (files of several dtypes, experts that it stacks), each rank holds those whole for that while.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ppod_models.loading import reading
from ppod_trainer.sharding import hollow_copy

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that a model's files can be mapped in: that of all their weights; float32 where there are several.

    Raises:
        ModelSourceError: one cannot be read.
    """
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with reading(path), safe_open(path, framework="pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - it is no dict
    weights = [dtype for dtype in found if dtype.startswith(("F", "BF"))]
    return _DTYPES.get(weights[0], torch.float32) if len(weights) == 1 else torch.float32


def without_weights(stored: ModelT) -> ModelT:
    """A float32 model like one in the dtype of its files: parameters on the meta device, buffers as they ought to be.

    Buffers that no file holds, such as rotary frequencies, may be rounded in a model of another dtype: they are
    computed anew.
    """
    model = hollow_copy(stored, torch.float32).requires_grad_(requires_grad=True)
    model.config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        fresh = type(stored)(copy.deepcopy(model.config))
    kept = stored.state_dict()
    for name, buffer in fresh.named_buffers():
        owner, _, own_name = name.rpartition(".")
        value = kept[name].to(buffer.dtype) if name in kept else buffer
        setattr(model.get_submodule(owner), own_name, value)
    return model


def read_parts(policy: nn.Module, stored: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give all divided parameters on the meta device this rank's rows; ties between parameters stay.

    Args:
        policy: divided by `shard_policy`.
        stored: whole tensors, by the names that the parameters have without an adapter.
        device: where the rows are kept.
    """
    read: dict[int, nn.Parameter] = {}
    parts: dict[str, nn.Parameter] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, DTensor) or not parameter.is_meta:
            continue
        if id(parameter) not in read:
            part = _rows_of(parameter, stored[name.replace(".base_layer.", ".")], device)
            read[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        parts[name] = read[id(parameter)]
    policy.load_state_dict(parts, strict=False, assign=True)


@torch.no_grad()
def _rows_of(parameter: DTensor, stored: torch.Tensor, device: torch.device) -> torch.Tensor:
    """This rank's rows, as FSDP cuts them: all ranks have as many but for the last ones."""
    part = torch.empty_like(parameter, device=device)
    assert isinstance(part, DTensor)
    rows, mesh = part.to_local(), parameter.device_mesh
    first = mesh.get_local_rank() * -(-len(stored) // mesh.size())
    rows.copy_(stored[first : first + len(rows)])
    return part
