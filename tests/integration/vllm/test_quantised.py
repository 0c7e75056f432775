"""An engine whose checkpoint is quantised: it serves, and is never given weights that its loaders do not take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppod import FailedPrecondition, GenerationClient, Sampling, WeightClient
from ppod.client import WeightPush
from support.tiny_model import build_model, build_tokenizer
from support.vllm_services import running_vllm
from support.weight_tensors import weight_tensors

_EIGHT_BITS: dict[str, object] = {"num_bits": 8, "type": "int", "symmetric": True}


def save_quantised(directory: Path) -> Path:
    """The tiny model with linear layers of 8 bits, in the form of compressed-tensors."""
    build_model(tied=False).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        stored[name] = weight
        if ".layers." in name and weight.ndim == 2:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            stored |= {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    group = {
        "targets": ["Linear"],
        "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
        "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
    }
    declared = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    return directory


def test_a_push_to_a_quantised_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """vLLM would find at the commit that parameters got no weights, and restore others than there were."""
    with (
        running_vllm(save_quantised(tmp_path / "model"), tmp_path) as service,
        GenerationClient(service.target) as client,
        WeightClient(service.admin_target) as weights,
    ):

        def complete() -> list[int]:
            return client.generate([[65, 66, 67]], Sampling(max_tokens=12), seeds=[1])[0].token_ids.tolist()

        before = complete()
        with pytest.raises(FailedPrecondition, match="quantised by compressed-tensors, the request needs one that"):
            weights.push(WeightPush(1, weight_tensors(build_model(seed=3, tied=False))))
        assert complete() == before
        assert weights.status().state.weight_version == 0
