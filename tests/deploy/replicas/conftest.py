"""A cluster of real services with the tiny model."""

from __future__ import annotations

import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.pods import Cluster, Deployment, RunningPod, running_cluster
from support.services import tiny_model_config

# They take minutes: `make test-replicas` runs them.
collect_ignore = (
    []
    if os.environ.get("PPOD_TEST_REPLICAS")
    else [f"test_{name}.py" for name in ("scored_by_pods", "trained_on_pods", "cut_networks")]
)

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need root and iproute2: `make test-replicas` as root runs this",
)


@pytest.fixture
def networked_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster whose pods are in network namespaces, so that a test can cut their links."""
    with running_cluster(tmp_path, namespaced=True) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.api.kubeconfig(tmp_path / "kubeconfig")))
        yield made


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An API server that this process's clients ask, and no pods yet."""
    with running_cluster(tmp_path) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.api.kubeconfig(tmp_path / "kubeconfig")))
        yield made


def deploy_reward(cluster: Cluster, model_dir: Path, head: Path, replicas: int) -> Deployment:
    model = tiny_model_config(model_dir)
    rewards = [{"name": "reward", "model": model, "head": str(head)}]
    return cluster.deploy("ppod-reward", "ppod_services.reward", {"rewards": rewards}, replicas)


def served_calls(deployment: Deployment, pod: RunningPod, method: str) -> float:
    """Calls of a method that a pod answered with OK, by its own metrics."""
    url = f"http://{pod.host}:{deployment.ports[2]}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    found = re.findall(rf'^ppod_rpc_total{{code="OK",method="[^"]*{method}"}} ([0-9.e+]+)$', text, re.M)
    return sum(map(float, found))


def seconds_until(true: Callable[[], bool], timeout_s: float) -> float:
    """How long it took; fails after `timeout_s`."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - begun
