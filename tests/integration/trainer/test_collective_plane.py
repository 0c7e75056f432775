"""Weights by a process group's broadcasts: the same checks and errors as by a stream, and groups that are made anew."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ppod import FailedPrecondition, InvalidArgument, PermissionDenied, PpodError, Unavailable, WeightClient
from ppod.client import WeightPush
from ppod_models.process_groups import BroadcastGroup, GroupError
from ppod_trainer import collective_plane
from ppod_trainer.collective_plane import CollectivePlane
from ppod_trainer.config import CollectiveConfig, WeightTransferConfig
from ppod_trainer.errors import TrainerError, WeightPushError
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.broadcasts import BUCKET, ask, group_of, sending
from support.processes import ServiceProcess, running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_checks import assert_serves, assert_takes_next
from support.weight_tensors import weight_tensors

FULL_BYTES = sum(parameter.numel() * 4 for parameter in build_model().parameters())


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def generator(model_dir: Path, directory: Path, allowed: str = "127.0.0.1:*") -> Iterator[ServiceProcess]:
    weights = {"collective_addresses": [allowed], "idle_timeout_s": 3}
    values = {"model": tiny_model_config(model_dir), "weights": weights}
    with running_service("ppod_services.generation", directory, values) as service:
        yield service


@pytest.fixture(scope="module")
def replicas(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServiceProcess]]:
    directory = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        yield [stack.enter_context(generator(tiny_model_dir, directory)) for _ in range(2)]


@contextmanager
def syncing(replicas: Sequence[ServiceProcess], port: int) -> Iterator[WeightSync]:
    config = WeightTransferConfig(plane="collective", collective=CollectiveConfig(port=port, bucket_mib=1, timeout_s=4))
    sync = WeightSync(FixedReplicas([WeightClient(one.admin_target, timeout_s=20) for one in replicas], "stop"), config)
    try:
        yield sync
    finally:
        sync.close()


def test_one_group_brings_version_after_version(replicas: list[ServiceProcess], port: int) -> None:
    with syncing(replicas, port) as sync:
        version = max(sync.serving_versions())
        for step in (1, 2, 3):
            model = build_model(seed=step)
            report = sync.push(model, torch.float32, version + step)
            assert (report.sent_bytes, report.lost) == (FULL_BYTES, ())
            for replica in replicas:
                assert_serves(replica, version + step, model)
        plane = sync._plane
        assert isinstance(plane, CollectivePlane)
        assert plane._epoch == 1


def test_who_refuses_keeps_all_at_their_versions(replicas: list[ServiceProcess], port: int) -> None:
    """One replica is further on than the other: nothing is broadcast, at once; the next version reaches both."""
    first, second = build_model(seed=4), build_model(seed=5)
    with syncing(replicas, port) as sync:
        version = max(sync.serving_versions()) + 1
        sync.push(first, torch.float32, version)
        with WeightClient(replicas[1].admin_target) as other:
            other.prepare(version + 5, weight_tensors(second))
            other.commit(version + 5)
        begun = time.monotonic()
        with pytest.raises(WeightPushError, match="weight_version") as raised:
            sync.push(build_model(seed=6), torch.float32, version + 1)
        assert time.monotonic() - begun < 2.5
        assert "the sender gave up" in str(raised.value)
        assert_serves(replicas[0], version, first)
        assert_serves(replicas[1], version + 5, second)
        sync.push(first, torch.float32, version + 6)
    for replica in replicas:
        assert_serves(replica, version + 6, first)
        assert_takes_next(replica, version + 7, seed=6)


def test_a_replica_that_was_started_again_joins_a_new_group(
    replicas: list[ServiceProcess], tiny_model_dir: Path, tmp_path: Path, port: int
) -> None:
    model = build_model(seed=7)
    with ExitStack() as stack:
        mortal = stack.enter_context(generator(tiny_model_dir, tmp_path))
        sync = stack.enter_context(syncing([replicas[0], mortal], port))
        version = max(sync.serving_versions()) + 1
        sync.push(model, torch.float32, version)
        mortal.process.kill()
        mortal.wait()
        with pytest.raises(WeightPushError, match=mortal.admin_target):
            sync.push(build_model(seed=8), torch.float32, version + 1)
        assert_serves(replicas[0], version, model)
        again = stack.enter_context(restarted(mortal, tiny_model_dir, tmp_path))
        version = push_in_the_end(sync, model, version + 2)
        assert_serves(replicas[0], version, model)
        assert_serves(again, version, model)


def test_a_push_that_failed_is_done_again_under_the_same_version(
    replicas: list[ServiceProcess], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run does where no replica has it. What the first attempt left in the store must not be met."""
    send = collective_plane._broadcast
    attempts: list[int] = []

    def broken_once(members: BroadcastGroup, *what: Any) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise GroupError("the network broke")
        send(members, *what)

    monkeypatch.setattr(collective_plane, "_broadcast", broken_once)
    with syncing(replicas, port) as sync:
        version = max(sync.serving_versions()) + 1
        model = build_model(seed=8)
        with pytest.raises(WeightPushError):
            sync.push(model, torch.float32, version)
        sync.push(model, torch.float32, version)
        for replica in replicas:
            assert_serves(replica, version, model)
    assert len(attempts) == 2


def test_a_version_that_was_broadcast_and_never_committed_is_done_again(
    tiny_model_dir: Path, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica dies between the two, and no replica has the version: it is pushed again under the same number."""
    with ExitStack() as stack:
        mortal = stack.enter_context(generator(tiny_model_dir, tmp_path))
        sync = stack.enter_context(syncing([mortal], port))
        sync.push(build_model(seed=7), torch.float32, 1)
        commit = WeightClient.commit

        def die(self: WeightClient, *what: Any, **how: Any) -> float:
            mortal.process.kill()
            mortal.wait()
            return commit(self, *what, **how)

        monkeypatch.setattr(WeightClient, "commit", die)
        model = build_model(seed=8)
        with pytest.raises(WeightPushError, match="commit of weight version 2"):
            sync.push(model, torch.float32, 2)
        monkeypatch.undo()
        again = stack.enter_context(restarted(mortal, tiny_model_dir, tmp_path))
        until = time.monotonic() + 30
        while serving_versions(sync) != {0}:
            assert time.monotonic() < until
            time.sleep(0.1)
        sync.push(model, torch.float32, 2)
        assert_serves(again, 2, model)


class ComingAndGoing(FixedReplicas):
    """As pods are: the run goes on without those that are away."""

    change = True

    def excuses(self, target: str, error: PpodError) -> bool:
        del target
        return isinstance(error, Unavailable)


def test_who_leaves_breaks_the_group_for_nobody(
    replicas: list[ServiceProcess], tiny_model_dir: Path, tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One is killed as the broadcast begins: the others get that version by a stream, and the next one by a group."""
    config = WeightTransferConfig(plane="collective", collective=CollectiveConfig(port=port, bucket_mib=1, timeout_s=4))
    with ExitStack() as stack:
        mortal = stack.enter_context(generator(tiny_model_dir, tmp_path))
        targets = [one.admin_target for one in (*replicas, mortal)]
        clients = [WeightClient(target, timeout_s=20) for target in targets]
        sync = WeightSync(ComingAndGoing(clients, "stop"), config)
        stack.callback(sync.close)
        version = max(sync.serving_versions()) + 1
        assert sync.push(build_model(seed=7), torch.float32, version).fallbacks == 0
        plane = sync._plane
        assert isinstance(plane, CollectivePlane)
        send = plane._send

        def kill_and_send(push: WeightPush) -> None:
            mortal.process.kill()
            mortal.wait()
            send(push)

        plane._send = kill_and_send
        model = build_model(seed=8)
        report = sync.push(model, torch.float32, version + 1)
        plane._send = send
        assert (report.fallbacks, report.lost) == (3, (mortal.admin_target,))
        assert "the broadcast did not reach" in caplog.text
        for replica in replicas:
            assert_serves(replica, version + 1, model)
        model = build_model(seed=9)
        report = sync.push(model, torch.float32, version + 2)
        # It does not answer, so it is no part of the group, and a stream does not reach it either.
        assert (report.fallbacks, report.lost) == (1, (mortal.admin_target,))
        for replica in replicas:
            assert_serves(replica, version + 2, model)
            assert_takes_next(replica, version + 3, seed=6)


def push_in_the_end(sync: WeightSync, model: torch.nn.Module, version: int) -> int:
    """Push until it works, as a run does: for a while a channel remembers that nobody listened."""
    until = time.monotonic() + 30
    while True:
        try:
            sync.push(model, torch.float32, version)
        except WeightPushError:
            assert time.monotonic() < until
            time.sleep(0.2)
            with suppress(WeightPushError):
                version = max(version, *(serving + 1 for serving in sync.serving_versions()))
        else:
            return version


def serving_versions(sync: WeightSync) -> set[int]:
    """Empty where a replica does not answer."""
    try:
        return sync.serving_versions()
    except WeightPushError:
        return set()


@contextmanager
def restarted(service: ServiceProcess, model_dir: Path, directory: Path) -> Iterator[ServiceProcess]:
    """The same service on the same ports."""
    values = {
        "model": tiny_model_config(model_dir),
        "weights": {"collective_addresses": ["127.0.0.1:*"], "idle_timeout_s": 3},
        "listen": {"port": service.port, "admin_port": service.admin_port, "metrics_port": service.metrics_port},
    }
    with running_service("ppod_services.generation", directory, values):
        yield service


def test_a_group_that_cannot_be_met_is_refused(
    replicas: list[ServiceProcess], tiny_model_dir: Path, tmp_path: Path, port: int
) -> None:
    with pytest.raises(InvalidArgument, match="backend"):
        ask(replicas[0], build_model(seed=9), group_of(replicas[0], port, "mpi"))
    with pytest.raises(Unavailable, match="cannot be reached"):
        ask(replicas[0], build_model(seed=9), group_of(replicas[0], port))
    if not torch.cuda.is_available():
        with pytest.raises(FailedPrecondition, match="nccl"):
            ask(replicas[0], build_model(seed=9), group_of(replicas[0], port, "nccl"))
    with (
        generator(tiny_model_dir, tmp_path, "10.0.0.1:*") as strict,
        pytest.raises(PermissionDenied, match=r"127\.0\.0\.1"),
    ):
        ask(strict, build_model(seed=9), group_of(strict, port))
    with WeightClient(replicas[0].admin_target) as client:
        version = client.status().state.weight_version
    assert_takes_next(replicas[0], version + 1, seed=6)


def test_a_store_that_is_away_is_logged_as_json(tiny_model_dir: Path, tmp_path: Path, port: int) -> None:
    """Torch's C++ code would write its own stack beside it."""
    weights = {"collective_addresses": ["127.0.0.1:*"], "idle_timeout_s": 0.25}
    values = {"model": tiny_model_config(tiny_model_dir), "weights": weights}
    with running_service("ppod_services.generation", tmp_path, values, fresh=True) as service:
        with pytest.raises(Unavailable, match=r"cannot be reached: it did not answer within 0\.25 s"):
            ask(service, build_model(seed=9), group_of(service, port))
        service.wait_for_event("call")
        # It goes on for longer than it was told to.
        time.sleep(1)
        [call] = [line for line in service.log() if line["event"] == "call"]
    assert call["code"] == "UNAVAILABLE"
    assert str(call["detail"]).startswith(f"the group test of 127.0.0.1:{port} broke: the store at 127.0.0.1:{port}")


def test_a_sender_that_ends_in_the_middle_leaves_the_old_version(replicas: list[ServiceProcess], port: int) -> None:
    model = build_model(seed=6)
    with WeightClient(replicas[0].admin_target) as client:
        version = client.status().state.weight_version + 1
    assert_takes_next(replicas[0], version, seed=6)
    with sending(replicas[0], port, build_model(seed=9)) as sender:
        sender.send(2)
        sender.members.close()
        with pytest.raises(Unavailable, match="the group by hand"):
            sender.asking.result(10)
    assert_serves(replicas[0], version, model)
    assert_takes_next(replicas[0], version + 1, seed=7)


def test_a_damaged_bucket_is_named_by_its_tensor(replicas: list[ServiceProcess], port: int) -> None:
    with sending(replicas[0], port, build_model(seed=9)) as sender:
        sender.damage(BUCKET + 5)
        with pytest.raises(GroupError):
            sender.send_all()
        with pytest.raises(InvalidArgument, match="xxh3"):
            sender.asking.result(10)
    with WeightClient(replicas[0].admin_target) as client:
        version = client.status().state.weight_version
    assert_takes_next(replicas[0], version + 1, seed=7)


def test_a_replica_that_is_killed_in_the_middle_is_noticed_at_once(
    tiny_model_dir: Path, tmp_path: Path, port: int
) -> None:
    with generator(tiny_model_dir, tmp_path) as mortal, sending(mortal, port, build_model(seed=9)) as sender:
        sender.send(2)
        mortal.process.kill()
        sender.assert_hears_that_nobody_is_there(within_s=3)


def test_a_sender_that_never_comes_is_given_up(replicas: list[ServiceProcess], port: int) -> None:
    """The store is there, the sender is not: the server gives up after its idle timeout."""
    plane = CollectivePlane(CollectiveConfig(port=port, timeout_s=4), dict)
    with pytest.raises(Unavailable, match="was not told within 3 s"):
        ask(replicas[0], build_model(seed=9), group_of(replicas[0], port))
    plane.close()


def test_a_port_in_use_is_named(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(TrainerError, match="set host and port"):
            CollectivePlane(CollectiveConfig(port=port), dict)
