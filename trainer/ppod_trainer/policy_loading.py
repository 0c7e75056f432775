"""Loading what is trained: policy, adapter and critic, divided among ranks where there are several."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ppod_models import loading
from ppod_models.logit_transforms import UNCHANGED, LogitTransform, declared_transforms, find_logit_transform
from ppod_models.sources import resolve
from ppod_trainer.config import TrainerConfig
from ppod_trainer.critic import ValueModel, load_value_model
from ppod_trainer.parted_weights import read_parts, stored_dtype, without_weights
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.quantisation import check_layers, dense_copy, load_quantised
from ppod_trainer.ranks import Ranks
from ppod_trainer.sharding import checkpoint_layers, hollow_copy, shard_policy

if TYPE_CHECKING:
    # It imports PEFT, which takes seconds that no other run should spend.
    from ppod_trainer.adapters import PolicyAdapter


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """What learns on this rank.

    Attributes:
        policy: with its critic.
        hollow: the language model without weights and adapter; None where the policy's is whole and not adapted.
        adapter: what of the language model learns; None: all.
    """

    policy: PolicyWithValue
    hollow: PreTrainedModel | None
    adapter: PolicyAdapter | None


def load_policy(config: TrainerConfig, ranks: Ranks) -> LoadedPolicy:
    """All ranks: load the policy, or this rank's part of it.

    Raises:
        TrainerError, ModelSourceError: something is missing, or does not fit.
    """
    paths = _resolve_in_turn(config, ranks)
    dtype = loading.pick_dtype(config.policy.dtype, ranks.device)
    if ranks.mesh is not None:
        return _load_divided(config, paths, ranks.mesh, ranks.device, dtype)
    model, hollow = _load_model(config, paths[0], ranks.device, dtype)
    value_model = _load_value_model(config, paths[1], ranks.device, loading.vocab_size(model), torch.float32)
    return _put_together(config, model, hollow, value_model, dtype, _logit_transform(config, model))


@dataclass(frozen=True, slots=True)
class _Undivided:
    """A language model before it is divided.

    Attributes:
        hollow: the same without weights and quantisation.
        stored: weights of what is on the meta device, by their names in the model.
        replicated: what cannot be divided.
    """

    model: PreTrainedModel
    hollow: PreTrainedModel
    transform: LogitTransform
    stored: Mapping[str, torch.Tensor]
    replicated: AbstractSet[nn.Parameter]


def _load_divided(
    config: TrainerConfig, paths: tuple[Path, Path | None], mesh: DeviceMesh, device: torch.device, dtype: torch.dtype
) -> LoadedPolicy:
    """Load this rank's part. What is trained is float32: small updates would vanish in bfloat16."""
    cpu = torch.device("cpu")
    base = _quantised(config, paths[0], device, dtype) if config.policy.quantised else _mapped(config, paths[0])
    weights = {f"model.{name}": tensor for name, tensor in base.stored.items()}
    trunk_dtype = torch.float32 if paths[1] is None else stored_dtype(paths[1])
    value_model = _load_value_model(config, paths[1], cpu, loading.vocab_size(base.model), trunk_dtype)
    if value_model is not None:
        trunk = value_model.trunk
        weights |= {f"value_trunk.{name}": parameter.detach() for name, parameter in trunk.named_parameters()}
        value_model = ValueModel(without_weights(trunk), value_model.head)
    loaded = _put_together(config, base.model, base.hollow, value_model, dtype, base.transform)
    shard_policy(loaded.policy, mesh, dtype, offload=config.memory.offload, replicated=base.replicated)
    read_parts(loaded.policy, weights, cpu if config.memory.offload else device)
    return loaded


def _mapped(config: TrainerConfig, path: Path) -> _Undivided:
    stored = loading.load_causal_lm(
        path, device=torch.device("cpu"), dtype=stored_dtype(path), attention=config.policy.attention
    )
    loading.check_dense(path, stored.config)
    model = without_weights(stored)
    weights = {name: parameter.detach() for name, parameter in stored.named_parameters()}
    return _Undivided(model, hollow_copy(model), _logit_transform(config, stored), weights, frozenset())


def _quantised(config: TrainerConfig, path: Path, device: torch.device, dtype: torch.dtype) -> _Undivided:
    """Values of 4 bits cannot be cut into rows: each rank has the base whole, and its part of what is trained."""
    model, hollow = _load_quantised(config, path, device, dtype)
    return _Undivided(model, hollow, _logit_transform(config, model), {}, frozenset(model.parameters()))


def _put_together(
    config: TrainerConfig,
    model: PreTrainedModel,
    hollow: PreTrainedModel | None,
    value_model: ValueModel | None,
    dtype: torch.dtype,
    transform: LogitTransform,
) -> LoadedPolicy:
    adapter = None
    if config.policy.lora is not None:
        from ppod_trainer.adapters import PolicyAdapter  # noqa: PLC0415

        hollow = hollow or hollow_copy(model)
        adapter = PolicyAdapter(model, config.policy.lora, config.seed)
    policy = PolicyWithValue(
        model,
        compute_dtype=dtype,
        value_model=value_model,
        detach_values=config.critic.detach,
        transform=transform,
    )
    if config.memory.gradient_checkpointing:
        checkpoint_layers(policy)
    return LoadedPolicy(policy, hollow, adapter)


def _logit_transform(config: TrainerConfig, model: PreTrainedModel) -> LogitTransform:
    """What the model, which has its weights, does to its logits after its output layer."""
    # The services make sure that those which declare nothing do nothing.
    return find_logit_transform(config.policy.source, model) if declared_transforms(model) else UNCHANGED


def _load_value_model(
    config: TrainerConfig, path: Path | None, device: torch.device, vocab_size: int, dtype: torch.dtype
) -> ValueModel | None:
    """The critic's own model, where it has one."""
    if path is None:
        return None
    attention = config.policy.attention
    return load_value_model(path, device=device, attention=attention, vocab_size=vocab_size, dtype=dtype)


def _resolve_in_turn(config: TrainerConfig, ranks: Ranks) -> tuple[Path, Path | None]:
    """Directories of the policy's source and of the critic's, where it has one."""
    if ranks.rank:
        ranks.wait_for_all()
    # What has to be fetched or converted is so by rank 0 first.
    path = resolve(config.policy.source).path
    critic = None
    if config.critic.kind == "model":
        critic = path if config.critic.source is None else resolve(config.critic.source).path
    if not ranks.rank:
        ranks.wait_for_all()
    return path, critic


def _load_model(
    config: TrainerConfig, path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The language model; of a quantised one also what it is without its weights and quantisation."""
    if config.policy.quantised:
        return _load_quantised(config, path, device, dtype)
    # What learns is float32: small updates would vanish in bfloat16.
    held = torch.float32 if config.policy.lora is None else dtype
    model = loading.load_causal_lm(path, device=device, dtype=held, attention=config.policy.attention)
    loading.check_dense(path, model.config)
    return model, None


def _load_quantised(
    config: TrainerConfig, path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    attention = config.policy.attention
    hollow = dense_copy(path, attention=attention)
    loading.check_dense(path, hollow.config)
    check_layers(hollow)
    return load_quantised(path, device=device, dtype=dtype, attention=attention), hollow
