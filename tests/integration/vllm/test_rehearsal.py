"""What a model's loader may do for the model to have a second set of parameters: by a rehearsal, on real layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ppod_services.generation.vllm_backend.staging import Weights
from ppod_services.generation.vllm_backend.standby import standby_of
from support.services import TEST_DEVICE
from support.vllm_services import require_vllm

# vLLM's own, of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")
DEVICE = torch.device(TEST_DEVICE)


class Layer(nn.Module):
    """One parameter, and what loading it may do besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.weight.weight_loader = self.load  # pyright: ignore[reportAttributeAccessIssue]
        self.hidden = [nn.Parameter(torch.arange(4.0), requires_grad=False)]
        self.way = "plain"

    def load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        param.data.copy_(loaded)
        if self.way == "elsewhere":
            self.hidden[0].data.copy_(loaded)
        elif self.way == "filled":
            self.hidden[0].data.fill_(7)
        elif self.way == "derived":
            self.total = float(len(loaded))


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer = Layer()
        self.layer.way = way
        if way == "buffer":
            self.register_buffer("scale", torch.ones(1))
        elif way == "processed":
            self.process_weights_after_loading = lambda: None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = set[str]()
        for name, tensor in weights:
            parameter: Any = self.layer.weight
            parameter.weight_loader(parameter, tensor)
            found.add(name)
        return found


class Same:
    def of(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(weights)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("plain", ""),
        ("elsewhere", "writes to what serves"),
        ("filled", "writes to what serves"),
        ("derived", "Layer keeps total of its weights"),
        ("buffer", "Model has scale beside its parameters"),
        ("processed", "Model makes something of its weights"),
    ],
)
def test_no_loader_runs_beside_what_serves_that_would_touch_it(
    caplog: pytest.LogCaptureFixture, way: str, reason: str
) -> None:
    require_vllm()
    from vllm.model_executor.model_loader.reload import (  # pyright: ignore  # noqa: PLC0415
        record_metadata_for_reloading,
    )

    model = Model(way)
    record_metadata_for_reloading(model)
    with caplog.at_level("INFO"):
        second = standby_of(model, DEVICE, Same(), [("layer.weight", "float32", (4,), 0)])
    for tensor in (model.layer.weight, model.layer.hidden[0]):
        assert torch.equal(tensor, torch.arange(4.0))
    assert not hasattr(model.layer, "total")
    assert (second is None) == bool(reason)
    if second is None:
        assert reason in caplog.text
        return
    second.fill([("layer.weight", torch.full((4,), 3.0))])
    assert torch.equal(model.layer.weight, torch.arange(4.0))
    second.install()
    assert torch.equal(model.layer.weight, torch.full((4,), 3.0))
