"""Pushes of weights to pods that come and go: who comes works only with the run's weights."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ppod import GenerationClient, Sampling, Unavailable, WeightClient
from ppod.client import parse_kubernetes_target
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.followed_replicas import FollowedReplicas, _tell_failure
from ppod_trainer.recovery import Recovery
from ppod_trainer.stopping import StopSignal
from ppod_trainer.weight_sync import WeightSync
from support.pods import Cluster, Deployment, RunningPod, running_cluster
from support.saved_adapters import adapter_tensors
from support.services import tiny_model_config
from support.tiny_adapter import build_adapted_model
from support.tiny_model import build_model, save_tiny_model
from support.weight_tensors import weight_tensors

WITHIN_S = 5.0


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.api.kubeconfig(tmp_path / "kubeconfig")))
        yield made


@dataclass
class Following:
    """What a run has of generation."""

    deployment: Deployment
    followed: FollowedReplicas
    sync: WeightSync
    client: GenerationClient

    def working(self) -> set[str]:
        """Hosts that the run's client sends work to."""
        return {address.partition(":")[0] for address in self.client._core.shared.replicas.addresses}  # pyright: ignore

    def admin(self, pod: RunningPod) -> WeightClient:
        return WeightClient(f"{pod.host}:{self.deployment.ports[1]}", timeout_s=10)

    def version(self, pod: RunningPod) -> int:
        with self.admin(pod) as client:
            return client.status().state.weight_version

    def assert_all_sample(self, version: int) -> None:
        """Every replica that works samples with this version, which is pinned."""
        for _ in self.working():
            [found] = self.client.generate([[1, 2]], Sampling(4), seeds=[3], weight_version=version)
            assert {span.weight_version for span in found.weight_spans} == {version}


@contextmanager
def following(cluster: Cluster, model_dir: Path, replicas: int, **transfer: str) -> Iterator[Following]:
    values = {"model": tiny_model_config(model_dir), "weights": {"relay_targets": ["*:*"]}}
    deployment = cluster.deploy("ppod-generation", "ppod_services.generation", values, replicas)
    target = parse_kubernetes_target("k8s:///ppod-generation:grpc")
    followed = FollowedReplicas(target, "admin", lambda admin, _: WeightClient(admin, timeout_s=20))
    sync = WeightSync(followed, WeightTransferConfig.model_validate(transfer))
    with GenerationClient("k8s:///ppod-generation:grpc", timeout_s=20, replicas=followed) as client:
        client.wait_ready(20)
        try:
            yield Following(deployment, followed, sync, client)
        finally:
            sync.close()


def wait_until(true: Callable[[], bool], timeout_s: float = WITHIN_S) -> float:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < timeout_s
        time.sleep(0.01)
    return time.monotonic() - begun


def test_a_newcomer_works_with_the_runs_weights_and_takes_part_in_pushes(
    cluster: Cluster, tiny_model_dir: Path
) -> None:
    with following(cluster, tiny_model_dir, 1, encoding="delta", relay="chain") as run:
        [first] = run.deployment.pods.values()
        model = build_model(seed=1)
        run.sync.push(model, torch.float32, 3)
        second = run.deployment.start()
        seen: set[tuple[bool, int]] = set()
        run.deployment.wait_ready(second)
        until = time.monotonic() + WITHIN_S
        while (True, 3) not in seen:
            assert time.monotonic() < until
            # Looked at in this order: once it works it has the version, not the other way round.
            works = second.host in run.working()
            seen.add((works, run.version(second)))
        assert seen <= {(False, 0), (False, 3), (True, 3)}
        run.assert_all_sample(3)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.5)
        report = run.sync.push(model, torch.float32, 4)
        assert (report.fallbacks, report.lost) == (0, ())
        assert [run.version(pod) for pod in (first, second)] == [4, 4]
        run.assert_all_sample(4)
        assert run.deployment.drain(first) == 0
        wait_until(lambda: run.working() == {second.host})
        assert run.sync.push(model, torch.float32, 5).lost == ()
        run.assert_all_sample(5)


def test_a_newcomer_gets_the_base_and_then_the_adapter(cluster: Cluster, tiny_model_dir: Path) -> None:
    with following(cluster, tiny_model_dir, 1) as run:
        run.sync.push(build_model(seed=0), torch.float32, 1)
        description, tensors = adapter_tensors(build_adapted_model(seed=4), "default")
        run.sync.push_adapter(description, tensors, 2)
        second = run.deployment.up()
        wait_until(lambda: second.host in run.working())
        with run.admin(second) as client:
            status = client.status()
        assert (status.state.weight_version, status.base_version) == (2, 1)
        run.assert_all_sample(2)
        assert run.sync.push_adapter(description, tensors, 3).lost == ()
        assert run.sync.base_versions() == {1}


def test_a_replica_that_dies_is_left_out_and_comes_back(
    cluster: Cluster, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with following(cluster, tiny_model_dir, 2) as run:
        first, second = run.deployment.pods.values()
        run.sync.push(build_model(seed=1), torch.float32, 1)
        run.deployment.kill(second)
        with caplog.at_level(logging.WARNING):
            report = run.sync.push(build_model(seed=2), torch.float32, 2)
        # Either the push met it, or the look that is taken every two seconds was first.
        assert len(report.lost) <= 1
        assert run.working() == {first.host}
        run.deployment.restart(second)
        wait_until(lambda: second.host in run.working(), 60)
        assert run.version(second) == 2
        run.assert_all_sample(2)


@pytest.mark.parametrize("version", [1, 9])
def test_a_pod_of_another_runs_weights_gets_no_work(
    cluster: Cluster, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    """Versions only grow: what is not behind this run cannot be put back, so it is kept out and named."""
    with following(cluster, tiny_model_dir, 1) as run:
        run.sync.push(build_model(seed=1), torch.float32, 1)
        second = run.deployment.start()
        wait_until(lambda: '"event": "ready"' in second.stderr, 60)
        with run.admin(second) as client:
            client.prepare(version, weight_tensors(build_model(seed=3)))
            client.commit(version)
        with caplog.at_level(logging.WARNING):
            run.deployment.wait_ready(second)
            wait_until(lambda: f"{second.host}:{run.deployment.ports[0]} gets no work until it serves" in caplog.text)
        assert second.host not in run.working()
        run.sync.push(build_model(seed=2), torch.float32, 10)
        wait_until(lambda: second.host in run.working(), 3 * WITHIN_S)
        assert run.version(second) == 10


def test_a_pod_of_another_runs_base_gets_no_adapter_and_no_work(
    cluster: Cluster, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its whole weights have the number of this run's base, and are others."""
    with following(cluster, tiny_model_dir, 1) as run:
        run.sync.push(build_model(seed=0), torch.float32, 1)
        description, tensors = adapter_tensors(build_adapted_model(seed=4), "default")
        run.sync.push_adapter(description, tensors, 2)
        second = run.deployment.start()
        wait_until(lambda: '"event": "ready"' in second.stderr, 60)
        with run.admin(second) as client:
            client.prepare(1, weight_tensors(build_model(seed=3)))
            client.commit(1)
        with caplog.at_level(logging.WARNING):
            run.deployment.wait_ready(second)
            wait_until(lambda: f"{second.host}:{run.deployment.ports[0]} gets no work until it serves" in caplog.text)
        assert second.host not in run.working()
        assert run.version(second) == 1


def test_a_pod_that_never_takes_the_weights_is_tried_ever_more_seldom(
    cluster: Cluster, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each try may send all weights, and keeps pushes to all others waiting."""
    with following(cluster, tiny_model_dir, 1) as run:
        run.sync.push(build_model(seed=1), torch.float32, 1)
        untied = tiny_model_config(save_tiny_model(tmp_path / "untied", tied=False))
        run.deployment.values = {**run.deployment.values, "model": untied}
        with caplog.at_level(logging.WARNING):
            second = run.deployment.up()
            refused = f"{second.host}:{run.deployment.ports[0]} gets no work until it serves"
            wait_until(lambda: refused in caplog.text)
            [member] = [one for one in run.followed._members.values() if one.endpoint.pod == second.name]
            # By then the next try is two seconds away.
            wait_until(lambda: member.failures == 3, 3 * WITHIN_S)
        assert caplog.text.count(refused) == 1, "told once"
        assert second.host not in run.working()


def test_weights_that_do_not_fit_stop_the_run(cluster: Cluster, tiny_model_dir: Path) -> None:
    with following(cluster, tiny_model_dir, 2) as run:
        run.sync.push(build_model(seed=1), torch.float32, 1)
        with pytest.raises(WeightPushError, match="prepare of weight version 2 failed on 2 of 2"):
            run.sync.push(torch.nn.Linear(2, 2), torch.float32, 2)
        run.assert_all_sample(1)


def test_without_any_pod_pushes_and_calls_say_so(cluster: Cluster, tiny_model_dir: Path) -> None:
    with following(cluster, tiny_model_dir, 1) as run:
        [only] = run.deployment.pods.values()
        run.sync.push(build_model(seed=1), torch.float32, 1)
        only.process.send_signal(signal.SIGTERM)
        run.deployment.endpoints.terminating(only.name)
        only.process.wait(30)
        wait_until(lambda: not run.working())
        with pytest.raises(WeightPushError, match="Service ppod-generation has no ready pod"):
            run.sync.push(build_model(seed=1), torch.float32, 2)
        with pytest.raises(Unavailable, match="Service ppod-generation in namespace ppod has no ready pod"):
            run.client.generate([[1]], Sampling(2), timeout_s=0.5)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_replicas_whose_commits_are_not_heard_of_get_work_again(
    cluster: Cluster, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, adapted: bool
) -> None:
    """The trainer's network fails as they commit. They did, and none goes back to the version before."""
    with following(cluster, tiny_model_dir, 2) as run:
        first, second = run.deployment.pods.values()
        model = build_model(seed=0)
        run.sync.push(model, torch.float32, 1)
        cut = False
        commit, status = WeightClient.commit, WeightClient.status

        def commits(client: WeightClient, weight_version: int, **options: Any) -> float:
            nonlocal cut
            cut = True
            commit(client, weight_version, **options)
            raise Unavailable("the network is down")

        def tells(client: WeightClient, **options: Any) -> object:
            if cut:
                raise Unavailable("the network is down")
            return status(client, **options)

        def push(version: int) -> None:
            if adapted:
                run.sync.push_adapter(*adapter_tensors(build_adapted_model(seed=4), "default"), version, 1)
            else:
                run.sync.push(model, torch.float32, version)

        with monkeypatch.context() as patched:
            patched.setattr(WeightClient, "commit", commits)
            patched.setattr(WeightClient, "status", tells)
            with pytest.raises(WeightPushError, match="failed on 2 of 2") as failed:
                push(2)
            wait_until(lambda: not run.working())
        assert [run.version(pod) for pod in (first, second)] == [2, 2]
        connections = SimpleNamespace(wait_ready=run.client.wait_ready)
        recovery = Recovery(cast(Any, connections), 3 * WITHIN_S, StopSignal())
        recovery.come_back(failed.value, lambda: push(max(run.sync.serving_versions()) + 1))
        wait_until(lambda: run.working() == {first.host, second.host})
        run.assert_all_sample(run.version(first))


def test_a_fault_in_catching_up_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """It ends a job of a pool, whose outcome nobody else reads."""
    outcomes: list[Future[None]] = [Future() for _ in range(3)]
    outcomes[0].set_result(None)
    outcomes[1].cancel()
    outcomes[2].set_exception(KeyError("layout"))
    for outcome in outcomes:
        outcome.add_done_callback(_tell_failure)
    [record] = caplog.records
    assert (record.getMessage(), record.exc_info and record.exc_info[0]) == (
        "a replica was not given its weights",
        KeyError,
    )
