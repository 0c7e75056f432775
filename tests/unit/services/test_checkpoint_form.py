"""Weights as transformers holds them become those of a checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, WeightConverter

from ppod_services.generation.vllm_backend import checkpoint_form
from ppod_services.generation.vllm_backend.checkpoint import Checkpoint
from ppod_services.generation.vllm_backend.checkpoint_form import CheckpointForm
from support.architectures import build_architecture
from support.tiny_model import build_model, save_tiny_model


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """With other weights than its files."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    return model


def pushed(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.data) for name, parameter in model.named_parameters()]


def saved(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    """Its weights as transformers saves them."""
    model.save_pretrained(directory)
    checkpoint = Checkpoint(directory)
    return {name: tensor for name in checkpoint.names if (tensor := checkpoint.read(name)) is not None}


def test_stacked_experts_are_told_apart(tmp_path: Path) -> None:
    build_architecture("mixtral").save_pretrained(tmp_path / "started")
    model = changed(build_architecture("mixtral"))
    found = dict(CheckpointForm(tmp_path / "started").of(pushed(model)))
    expected = saved(model, tmp_path / "saved")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in expected
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_no_parameter_is_that_of_the_files(tmp_path: Path) -> None:
    started = build_architecture("glm4_moe")
    bias = started.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.any()
    started.save_pretrained(tmp_path / "started")
    model = changed(build_architecture("glm4_moe"))
    found = dict(CheckpointForm(tmp_path / "started").of(pushed(model)))
    assert torch.equal(found.pop("model.layers.1.mlp.gate.e_score_correction_bias"), bias)
    expected = saved(model, tmp_path / "saved")
    assert torch.equal(
        found["model.layers.1.mlp.experts.2.up_proj.weight"], expected["model.layers.1.mlp.experts.2.up_proj.weight"]
    )


def test_what_is_the_same_in_both_is_not_copied(tmp_path: Path) -> None:
    own = pushed(build_model(tied=False))
    found = list(CheckpointForm(save_tiny_model(tmp_path / "model", tied=False)).of(own))
    assert [(name, tensor.data_ptr()) for name, tensor in found] == [(name, tensor.data_ptr()) for name, tensor in own]


def test_what_is_made_of_several_parameters_waits_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of checkpoints that hold one matrix where transformers has two."""
    halves = [r"mlp.gate_proj.weight", r"mlp.up_proj.weight"]

    def conversions(*_: object, **__: object) -> list[WeightConverter]:
        return [WeightConverter("mlp.gate_up_proj.weight", halves, operations=[Chunk(dim=0)])]

    monkeypatch.setattr(checkpoint_form, "get_model_conversion_mapping", conversions)
    model = build_model()
    found = dict(CheckpointForm(save_tiny_model(tmp_path / "model")).of(pushed(model)))
    mlp = model.model.layers[1].mlp
    whole = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    assert torch.equal(found["model.layers.1.mlp.gate_up_proj.weight"], whole)
    assert "model.layers.1.mlp.up_proj.weight" not in found
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], mlp.down_proj.weight)
