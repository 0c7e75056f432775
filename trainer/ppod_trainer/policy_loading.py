"""Loading what is trained: policy, adapter and critic, divided among ranks where there are several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ppod_models import loading
from ppod_models.logit_transforms import UNCHANGED, declared_transforms, find_logit_transform
from ppod_models.sources import resolve
from ppod_trainer.config import TrainerConfig
from ppod_trainer.critic import load_value_model
from ppod_trainer.errors import TrainerError
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.quantisation import dense_copy, load_quantised
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
    path, critic_path = _resolve_in_turn(config, ranks)
    dtype = loading.pick_dtype(config.policy.dtype, ranks.device)
    # Divided ranks take one layer after the other from the CPU to their devices.
    device = ranks.device if ranks.mesh is None else torch.device("cpu")
    model, hollow = _load_model(config, path, device, dtype, ranks)
    # The services make sure that other models do nothing to theirs.
    transform = find_logit_transform(config.policy.source, model) if declared_transforms(model) else UNCHANGED
    vocab_size, adapter = loading.vocab_size(model), None
    if config.policy.lora is not None:
        from ppod_trainer.adapters import PolicyAdapter  # noqa: PLC0415

        hollow = hollow or hollow_copy(model)
        adapter = PolicyAdapter(model, config.policy.lora)
    value_model = None
    if critic_path is not None:
        attention = config.policy.attention
        value_model = load_value_model(critic_path, device=device, attention=attention, vocab_size=vocab_size)
    policy = PolicyWithValue(
        model,
        compute_dtype=dtype,
        value_model=value_model,
        detach_values=config.critic.detach,
        transform=transform,
    )
    if ranks.mesh is not None:
        hollow = hollow or hollow_copy(model)
    if config.memory.gradient_checkpointing:
        checkpoint_layers(policy)
    if ranks.mesh is not None:
        shard_policy(policy, ranks.mesh, dtype, offload=config.memory.offload)
    return LoadedPolicy(policy, hollow, adapter)


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
    config: TrainerConfig, path: Path, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The language model; of a quantised one also what it is without its weights and quantisation."""
    attention, lora = config.policy.attention, config.policy.lora
    if lora is None or ranks.mesh is not None:
        if lora is not None and lora.quantization != "none":
            raise TrainerError(
                f"policy.lora.quantization is {lora.quantization!r} with {ranks.size} ranks, or memory.offload: 4-bit "
                "weights cannot be divided; use one rank without offload, or quantization none"
            )
        # What learns is float32: small updates would vanish in bfloat16. FSDP wants one dtype for all of a layer.
        return loading.load_causal_lm(path, device=device, dtype=torch.float32, attention=attention), None
    if lora.quantization == "none":
        return loading.load_causal_lm(path, device=device, dtype=dtype, attention=attention), None
    model = load_quantised(path, device=device, dtype=dtype, attention=attention)
    return model, dense_copy(path, attention=attention)
