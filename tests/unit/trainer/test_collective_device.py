"""The CUDA device on which the trainer's rank of a group is. Each thread's own would be the first one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppod_trainer import collective_plane
from ppod_trainer.collective_plane import CollectivePlane
from ppod_trainer.config import CollectiveConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.policy_weights import PolicyTensors
from ppod_trainer.weight_planes import Outgoing
from support.joined_devices import note_joins
from support.processes import free_ports


def test_the_trainers_rank_is_on_the_policys_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = note_joins(monkeypatch, collective_plane, "BroadcastGroup")
    policy = PolicyTensors(nn.Linear(2, 2), torch.float32)
    plane = CollectivePlane(CollectiveConfig(port=free_ports(1)[0], timeout_s=5), dict)
    try:
        for version, device in enumerate((torch.device("cuda:1"), None), start=1):
            policy.device = device
            with pytest.raises(WeightPushError, match="nobody came"), plane.whole(Outgoing(version, policy, None)):
                pass
    finally:
        plane.close()
    assert found == ["cuda:1", None]
