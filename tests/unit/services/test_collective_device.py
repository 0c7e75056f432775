"""The CUDA device on which a service's rank of a group is. Each thread's own would be the first one."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
import xxhash
from torch import nn

from ppod import Unavailable
from ppod_models.process_groups import GroupError
from ppod_services.core import collective_weights
from ppod_services.core.collective_weights import CollectiveReceiver
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingGroup, IncomingManifest, IncomingTensor
from ppod_services.core.weights import ServedWeights


@pytest.mark.parametrize(("device", "own"), [("cuda:1", "cuda:1"), ("cuda", "cuda"), ("cpu", None)])
def test_a_service_receives_on_its_models_device(monkeypatch: pytest.MonkeyPatch, device: str, own: str | None) -> None:
    threads = threading.local()
    found: list[str | None] = []

    @contextmanager
    def on(device: torch.device) -> Generator[None]:
        threads.device = str(device)
        try:
            yield
        finally:
            del threads.device

    def join(*_: object) -> None:
        found.append(getattr(threads, "device", None))
        raise GroupError("nobody came")

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(collective_weights, "GroupMember", join)
    weights = ServedWeights(ModelWeights(nn.Linear(1, 1, bias=False)), lambda _: None)
    tensor = IncomingTensor("weight", "float32", (1, 1), xxhash.xxh3_64_intdigest(bytes(4)))
    manifest = IncomingManifest(1, (tensor,), collective=IncomingGroup("a", "127.0.0.1:1", "gloo", 1, 2, 4))
    receiver = CollectiveReceiver(["127.0.0.1:*"], 5, torch.device(device))
    with pytest.raises(Unavailable, match="nobody came"):
        receiver.prepare(weights, manifest, threading.Event())
    assert found == [own]
