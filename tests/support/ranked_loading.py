"""A rank of a trainer that loads its part of the policy and ends: `python -m support.ranked_loading`.

Each leaves in the run directory loaded-RANK.json, in bytes: by how much its peak memory grew, and its own memory, which
is in no file, until the policy was loaded; and the whole model in float32.
With `--whole`, rank 0 also leaves what all have together: whole.safetensors, and of each parameter in parameters.json
the first name that it has, and whether it is trained.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ppod_models.configuration import load_config
from ppod_models.ending import exit_now
from ppod_trainer.assembly import load_leader
from ppod_trainer.config import TrainerConfig
from ppod_trainer.ranks import open_ranks
from ppod_trainer.sharding import whole

_USED = ("accelerate", "peft", "torch.distributed.checkpoint", "transformers.models.llama.modeling_llama")
"""Imported before the first look, these count as nothing."""


def memory() -> dict[str, int]:
    """The most memory that this process has held so far, and its memory that is in no file, in bytes."""
    lines = dict(one.split(":", 1) for one in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))}


def describe(policy: nn.Module) -> dict[str, tuple[str, bool]]:
    """Of each parameter the first of its names, and whether it is trained."""
    first = {id(parameter): name for name, parameter in policy.named_parameters()}
    every = policy.named_parameters(remove_duplicate=False)
    return {name: (first[id(parameter)], parameter.requires_grad) for name, parameter in every}


def tensors_of(policy: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, whole, and buffers; all ranks must call it."""
    found = {name: whole(parameter.detach()).clone() for name, parameter in policy.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in policy.named_buffers()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    config = load_config(TrainerConfig, options.config)
    with open_ranks(config.policy.device, config.ranks.timeout_s, mesh_of_one=config.memory.offload) as ranks:
        for name in _USED:
            importlib.import_module(name)
        before = memory()
        leader, _ = load_leader(config, ranks)
        grown = {name: after - before[name] for name, after in memory().items()}
        policy = leader.learner.policy
        model = 4 * sum(parameter.numel() for parameter in policy.parameters())
        (config.run_dir / f"loaded-{ranks.rank}.json").write_text(json.dumps({**grown, "model": model}))
        tensors = tensors_of(policy) if options.whole else {}
        if options.whole and not ranks.rank:
            save_file(tensors, config.run_dir / "whole.safetensors")
            (config.run_dir / "parameters.json").write_text(json.dumps(describe(policy)))


if __name__ == "__main__":
    main()
    exit_now(0)
