"""What a policy's memory is saved by: weights divided among ranks or kept on the host, activations computed again.

Weights, gradients and optimizer state are divided by FSDP2: parameters are DTensors in float32, cut along their first
dimension, and a layer's are gathered, in the dtype of the forward pass, while it computes. Gradients are summed, not
averaged: the loss of a minibatch is the sum over its tokens with weights over the whole of it, on whichever rank they
are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.quantisation import dense

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def decoder_layers(policy: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the transformers models in a module, by the class names that these declare."""
    names: set[str] = set()
    for module in policy.modules():
        if isinstance(module, PreTrainedModel):
            names.update(module._no_split_modules or ())  # pyright: ignore[reportPrivateUsage]
    return [module for module in policy.modules() if type(module).__name__ in names]


def checkpoint_layers(policy: nn.Module) -> None:
    """Compute each layer's activations again in the backward pass, so that only its inputs are kept in between.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Not by the switch that transformers has,
    which works in training mode alone, where dropout is on. Nothing random runs in a layer, so no state is kept of it.
    """
    for layer in decoder_layers(policy):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard_policy(
    policy: PolicyWithValue,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    offload: bool = False,
    replicated: AbstractSet[nn.Parameter] = frozenset(),
) -> None:
    """Divide a policy; each rank keeps its part, on the mesh's device or, to `offload`, the CPU.

    `replicated` parameters, which must not be trained, stay whole on each rank.

    What is on the meta device stays there, for `read_parts` to fill.

    Layers compute in `compute_dtype`; what they pass on stays as it is in one process under autocast, float32.
    Embeddings and heads are gathered in float32.
    """
    # Pages that cannot move are for copies to CUDA devices alone.
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    layer_policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in decoder_layers(policy):
        fully_shard(layer, mesh=mesh, mp_policy=layer_policy, offload_policy=place, ignored_params=set(replicated))
    fully_shard(policy, mesh=mesh, offload_policy=place, ignored_params=set(replicated))
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this a factor of 1 asks for PREMUL_SUM, which only NCCL has.
            module.set_force_sum_reduction_for_comms(True)


def free_gathered(policy: nn.Module) -> None:
    """Drop gathered weights that a forward pass without a backward pass leaves behind; they would be used again."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all ranks where it is divided."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def hollow_copy(model: ModelT, dtype: torch.dtype | None = None) -> ModelT:
    """A copy with parameters on the meta device, in another dtype if one is given: all of a model but its weights."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta", dtype=dtype), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def gather_parameters(model: nn.Module, dtype: torch.dtype, only: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whose name has `only` in it, whole, in `dtype` on the CPU, one after the other.

    All ranks must take all of them.
    """
    for name, parameter in model.named_parameters():
        if only not in name:
            continue
        yield name, whole(dense(parameter).to(dtype)).cpu()


def fill(hollow: PreTrainedModel, parameters: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A whole model from a hollow one, which stays hollow; ties between parameters stay."""
    model = copy.deepcopy(hollow)
    named = dict(model.named_parameters())
    filled = {id(named[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            module.register_parameter(name, filled[id(parameter)])
    return model
