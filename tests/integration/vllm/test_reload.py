"""Loads of weights by vLLM's reload that break: what comes next finds nothing of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ppod_services.generation.vllm_backend.reload import reload_weights
from support.vllm_services import require_vllm

PARTS = ("q", "k")


class Merged(nn.Module):
    """One parameter of two parts, as vLLM merges projections."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(PARTS), 3), requires_grad=False)
        self.weight.weight_loader = self.load  # pyright: ignore[reportAttributeAccessIssue]

    def load(self, param: torch.Tensor, loaded: torch.Tensor, part: int) -> None:
        param.data[part].copy_(loaded)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Merged(), Merged()])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = set[str]()
        for name, tensor in weights:
            layer, part = name.split(".")
            parameter: Any = self.layers[int(layer)].weight
            parameter.weight_loader(parameter, tensor, PARTS.index(part))
            found.add(f"layers.{layer}.weight")
        return found


def weights(value: float) -> list[tuple[str, torch.Tensor]]:
    """In another order than the layers have: all are half full before one is whole."""
    return [(f"{layer}.{part}", torch.full((3,), value)) for part in PARTS for layer in range(2)]


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("full")


@pytest.fixture
def layerwise() -> ModuleType:
    require_vllm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.model_executor.model_loader.reload import layerwise  # pyright: ignore  # noqa: PLC0415

    return layerwise


@pytest.mark.parametrize("whole", [False, True])
def test_a_load_that_found_no_memory_leaves_nothing_to_the_next(
    monkeypatch: pytest.MonkeyPatch, layerwise: ModuleType, whole: bool
) -> None:
    from vllm.config import VllmConfig  # pyright: ignore  # noqa: PLC0415

    config: Any = VllmConfig()
    model = Model()
    layerwise.record_metadata_for_reloading(model)
    places = [layer.weight.data_ptr() for layer in model.modules() if isinstance(layer, Merged)]
    reload_weights(config, model, weights(1))
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "materialize_layer", full)
        with pytest.raises(torch.OutOfMemoryError):
            reload_weights(config, model, weights(2) if whole else weights(2)[:3])
    reload_weights(config, model, weights(1))
    for layer, place in zip(model.layers, places, strict=True):
        assert torch.equal(layer.weight, torch.ones(2, 3))
        assert layer.weight.data_ptr() == place
