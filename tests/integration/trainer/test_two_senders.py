"""Two who push the same version to one server: neither takes the other's weights for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ppod import FailedPrecondition, InvalidArgument, Unavailable, WeightClient
from ppod.client import WeightPush
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.processes import ServiceProcess, running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_checks import assert_serves
from support.weight_tensors import weight_tensors

MINE, THEIRS = build_model(seed=71), build_model(seed=72)


@pytest.fixture(scope="module")
def replicas(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServiceProcess]]:
    directory = tmp_path_factory.mktemp("replicas")
    values = {"model": tiny_model_config(tiny_model_dir), "weights": {"relay_targets": ["127.0.0.1:*"]}}
    with (
        running_service("ppod_services.generation", directory, values) as first,
        running_service("ppod_services.generation", directory, values) as second,
    ):
        yield [first, second]


@pytest.fixture
def server(replicas: list[ServiceProcess]) -> Iterator[WeightClient]:
    with WeightClient(replicas[0].admin_target) as client:
        yield client


def push_of(model: torch.nn.Module, version: int, push_id: str) -> WeightPush:
    return WeightPush(version, weight_tensors(model), push_id=push_id)


def serving(client: WeightClient) -> int:
    return client.status().state.weight_version


class Interrupted(WeightClient):
    """Something happens before each commit is sent; it may raise what the commit is to end by."""

    before: Callable[[], None]

    def commit(self, *args: object, **kwargs: object) -> float:
        self.before()
        return super().commit(*args, **kwargs)  # type: ignore[arg-type]


@contextmanager
def syncing(service: ServiceProcess, before: Callable[[], None]) -> Iterator[WeightSync]:
    client = Interrupted(service.admin_target, timeout_s=20)
    client.before = before
    sync = WeightSync(FixedReplicas([client], "stop"), WeightTransferConfig())
    try:
        yield sync
    finally:
        sync.close()


def test_a_commit_is_of_its_own_push_alone(replicas: list[ServiceProcess], server: WeightClient) -> None:
    version = serving(server) + 1
    server.push(push_of(MINE, version, "mine"))
    server.push(push_of(THEIRS, version, "theirs"))
    with pytest.raises(FailedPrecondition, match=r"push_id.*theirs: another sender pushed the same version.*mine"):
        server.commit(version, push_id="mine")
    assert serving(server) == version - 1
    server.commit(version, push_id="theirs")
    assert_serves(replicas[0], version, THEIRS)
    assert server.status().push_id == "theirs"
    with pytest.raises(FailedPrecondition, match="push_id"):
        server.commit(version, push_id="mine")
    for again in ("theirs", ""):
        assert server.commit(version, push_id=again) == 0
    assert_serves(replicas[0], version, THEIRS)


def test_a_push_without_a_name_is_no_named_one(server: WeightClient) -> None:
    version = serving(server) + 1
    server.push(push_of(MINE, version, ""))
    with pytest.raises(FailedPrecondition, match=r"push_id.*none: another sender"):
        server.commit(version, push_id="mine")
    server.commit(version)
    assert server.status().push_id == ""


def test_a_name_has_its_bounds(server: WeightClient) -> None:
    version = serving(server) + 1
    with pytest.raises(InvalidArgument, match=r"manifest\.push_id.*65 characters"):
        server.push(push_of(MINE, version, "x" * 65))
    server.push(push_of(MINE, version, "x" * 64))
    server.commit(version, push_id="x" * 64)


def test_a_trainer_hears_that_another_one_prepared_its_version(
    replicas: list[ServiceProcess], server: WeightClient
) -> None:
    version = serving(server) + 1
    with syncing(replicas[0], lambda: server.push(push_of(THEIRS, version, "theirs")) and None) as sync:
        with pytest.raises(WeightPushError, match=f"commit of weight version {version} failed.*another sender"):
            sync.push(MINE, torch.float32, version)
        assert serving(server) == version - 1


@pytest.mark.parametrize("whose", ["mine", "theirs"])
def test_a_commit_whose_reply_was_lost_counts_where_its_own_push_serves(
    replicas: list[ServiceProcess], server: WeightClient, whose: str
) -> None:
    version = serving(server) + 1

    def commit_and_lose_the_reply() -> None:
        if whose == "theirs":
            server.push(push_of(THEIRS, version, "theirs"))
        server.commit(version)
        raise Unavailable("the reply was lost")

    with syncing(replicas[0], commit_and_lose_the_reply) as sync:
        if whose == "mine":
            sync.push(MINE, torch.float32, version)
        else:
            with pytest.raises(WeightPushError, match="the reply was lost"):
                sync.push(MINE, torch.float32, version)
    assert_serves(replicas[0], version, MINE if whose == "mine" else THEIRS)


def test_all_servers_of_a_relay_know_the_push_by_one_name(replicas: list[ServiceProcess]) -> None:
    clients = [WeightClient(one.admin_target, timeout_s=20) for one in replicas]
    sync = WeightSync(FixedReplicas(clients, "stop"), WeightTransferConfig(relay="chain"))
    try:
        sync.push(MINE, torch.float32, max(sync.serving_versions()) + 1)
        names = {client.status().push_id for client in clients}
        sync.push(THEIRS, torch.float32, max(sync.serving_versions()) + 1)
        others = {client.status().push_id for client in clients}
    finally:
        sync.close()
    assert len(names) == len(others) == 1
    assert "" not in names | others
    assert names != others
