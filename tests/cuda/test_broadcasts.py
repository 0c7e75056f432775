"""Weights by NCCL from a trainer to services, all on one device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore

from ppod import InvalidArgument, Unavailable, WeightClient
from ppod.client import CollectiveGroup
from ppod_models.process_groups import BroadcastGroup, GroupError, open_store, wait_for
from ppod_trainer.collective_plane import CollectivePlane
from ppod_trainer.config import CollectiveConfig, WeightTransferConfig
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.broadcasts import ANOTHER_HOST, BUCKET, ask, sending
from support.processes import ServiceProcess, free_ports, running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_checks import assert_serves, assert_takes_next

DEVICE = torch.device("cuda:0")


@contextmanager
def replica(model_dir: Path, directory: Path, name: str) -> Iterator[ServiceProcess]:
    """One that NCCL takes for another host's."""
    values = {
        "model": {**tiny_model_config(model_dir), "device": str(DEVICE)},
        "weights": {"collective_addresses": ["127.0.0.1:*"], "idle_timeout_s": 5},
    }
    variables = {**ANOTHER_HOST, "NCCL_HOSTID": name}
    with running_service("ppod_services.generation", directory, values, variables=variables) as service:
        yield service


@pytest.fixture(scope="module")
def replicas(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServiceProcess]]:
    directory = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        yield [stack.enter_context(replica(tiny_model_dir, directory, f"replica-{number}")) for number in range(2)]


def serving(service: ServiceProcess) -> int:
    with WeightClient(service.admin_target) as client:
        return client.status().state.weight_version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_brings_version_after_version(replicas: list[ServiceProcess], dtype: torch.dtype) -> None:
    collective = CollectiveConfig(port=free_ports(1)[0], bucket_mib=1, timeout_s=20)
    config = WeightTransferConfig(plane="collective", collective=collective)
    clients = [WeightClient(one.admin_target, timeout_s=60) for one in replicas]
    sync = WeightSync(FixedReplicas(clients, "stop"), config)
    try:
        version = max(sync.serving_versions())
        for step in (1, 2, 3):
            model = build_model(seed=step)
            sync.push(model.to(DEVICE), dtype, version + step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.to(dtype))
            for one in replicas:
                assert_serves(one, version + step, model.cpu())
        plane = sync._plane
        assert isinstance(plane, CollectivePlane)
        assert (plane._backend, plane._epoch) == ("nccl", 1)
    finally:
        sync.close()


def test_a_damaged_bucket_is_named_and_the_old_version_serves(replicas: list[ServiceProcess]) -> None:
    assert_takes_next(replicas[0], serving(replicas[0]) + 1, seed=11)
    version = serving(replicas[0])
    with sending(replicas[0], free_ports(1)[0], build_model(seed=9), backend="nccl") as sender:
        sender.damage(BUCKET + 5)
        # So few bytes may all be on their way before the receiver leaves.
        with suppress(GroupError):
            sender.send_all()
        with pytest.raises(InvalidArgument, match="xxh3"):
            sender.asking.result(20)
    assert_serves(replicas[0], version, build_model(seed=11))
    assert_takes_next(replicas[0], version + 1, seed=12)


def test_a_party_that_does_not_come_is_given_up(replicas: list[ServiceProcess]) -> None:
    """Its group has three ranks, of which two come: NCCL itself would wait for the third without end."""
    assert_takes_next(replicas[0], serving(replicas[0]) + 1, seed=15)
    version = serving(replicas[0])
    port = free_ports(1)[0]
    store = open_store("127.0.0.1", port, master=True, timeout_s=10)
    target = replicas[0].admin_target
    group = CollectiveGroup(
        "of three", f"127.0.0.1:{port}", "nccl", {target: range(1, 2), "absent": range(2, 3)}, BUCKET
    )
    prefix = PrefixStore(f"ppod/{group.name}", store)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, replicas[0], build_model(seed=9), group)
        assert wait_for(prefix, f"{version + 1}/joined/1", 10) == b"0"
        prefix.set(f"{version + 1}/go", "1")
        members = BroadcastGroup("nccl", PrefixStore("1", prefix), 0, 3, 5)
        begun = time.monotonic()
        with pytest.raises(GroupError):
            members.broadcast(torch.zeros(BUCKET, dtype=torch.uint8, device=DEVICE))
        members.close()
        with pytest.raises(Unavailable, match="the group of three"):
            asking.result(30)
        assert time.monotonic() - begun < 40
    assert_serves(replicas[0], version, build_model(seed=15))
    assert_takes_next(replicas[0], version + 1, seed=16)


def test_a_sender_that_leaves_in_the_middle_leaves_the_old_version(replicas: list[ServiceProcess]) -> None:
    assert_takes_next(replicas[0], serving(replicas[0]) + 1, seed=13)
    version = serving(replicas[0])
    with sending(replicas[0], free_ports(1)[0], build_model(seed=9), backend="nccl") as sender:
        sender.send(2)
        sender.members.close()
        with pytest.raises(Unavailable, match="the group by hand"):
            sender.asking.result(20)
    assert_serves(replicas[0], version, build_model(seed=13))
    assert_takes_next(replicas[0], version + 1, seed=14)


def test_a_replica_that_is_killed_in_the_middle_is_noticed_in_time(tiny_model_dir: Path, tmp_path: Path) -> None:
    with (
        replica(tiny_model_dir, tmp_path, "mortal") as mortal,
        sending(mortal, free_ports(1)[0], build_model(seed=9), backend="nccl") as sender,
    ):
        sender.send(2)
        mortal.process.kill()
        sender.assert_hears_that_nobody_is_there(within_s=8)
