"""What a rank computes on."""

from __future__ import annotations

import pytest
import torch

from ppod_models.sources import ModelSourceError
from ppod_trainer.errors import RanksError
from ppod_trainer.ranks import open_ranks


def open_with(device: str, *, mesh_of_one: bool = False) -> torch.device:
    with open_ranks(device, 10.0, mesh_of_one=mesh_of_one) as ranks:
        return ranks.device


@pytest.mark.parametrize("mesh_of_one", [False, True])
def test_a_device_that_is_not_there_is_no_other_one(mesh_of_one: bool) -> None:
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ModelSourceError, match=f"device: found '{device}', expected auto, cpu, or one"):
            open_with(device, mesh_of_one=mesh_of_one)
    assert open_with("cpu", mesh_of_one=mesh_of_one) == torch.device("cpu")


def test_several_ranks_do_not_share_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(RanksError, match=r"policy\.device is 'cuda:0', one for 2 ranks; expected auto, cpu or cuda"):
        open_with("cuda:0")
    with pytest.raises(ModelSourceError, match="found 'cuda:99'"):
        open_with("cuda")
