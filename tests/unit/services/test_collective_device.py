"""The CUDA device on which a service's rank of a group is. Each thread's own would be the first one."""

from __future__ import annotations

import threading

import pytest
import torch
import xxhash
from torch import nn

from ppod import Unavailable
from ppod_services.core import collective_weights
from ppod_services.core.collective_weights import CollectiveReceiver
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest, IncomingTensor
from ppod_services.core.weights import ServedWeights
from support.joined_devices import note_joins


@pytest.mark.parametrize(("device", "own"), [("cuda:1", "cuda:1"), ("cuda", "cuda"), ("cpu", None)])
def test_a_service_receives_on_its_models_device(monkeypatch: pytest.MonkeyPatch, device: str, own: str | None) -> None:
    found = note_joins(monkeypatch, collective_weights, "GroupMember")
    weights = ServedWeights(ModelWeights(nn.Linear(1, 1, bias=False)), lambda _: None)
    tensor = IncomingTensor("weight", "float32", (1, 1), xxhash.xxh3_64_intdigest(bytes(4)))
    manifest = IncomingManifest(1, (tensor,), collective=IncomingGroup("a", "127.0.0.1:1", "gloo", 1, 2, 4))
    receiver = CollectiveReceiver(["127.0.0.1:*"], 5, torch.device(device))
    with pytest.raises(Unavailable, match="nobody came"):
        receiver.prepare(weights, manifest, threading.Event())
    assert found == [own]
