"""A run that is followed, though what is asked does not always answer."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from ppod_deploy.k8s import train
from ppod_deploy.k8s.cluster import Cluster
from support.fake_kubernetes import FakeKubernetes

from .conftest import Command, pod
from .test_train import job_controller, write


def test_a_run_is_followed_though_the_api_server_is_replaced(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    """Its connections break, and for a while it answers nothing."""
    config = write(tmp_path / "t.yaml", {"steps": 1})

    def replace_server(name: str) -> None:
        made = pod(f"{name}-0", "trainer", port=9104)
        made["metadata"]["labels"]["job-name"] = name
        api.put("v1", "pods", "ppod", made)
        api.log(f"{name}-0", "one")
        while not api.seen("GET", "/log"):
            time.sleep(0.01)
        api.unavailable = True
        api.log_cuts[f"{name}-0"] = 2
        begun = len(api.requests)
        api.log(f"{name}-0", "two")
        until = time.monotonic() + 10.0
        while len(api.requests) < begun + 2 and time.monotonic() < until:
            time.sleep(0.01)
        api.unavailable = False

    with job_controller(api, ["three"], 3, before=replace_server):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 3, result.stderr
    assert (tmp_path / "out" / "trainer.log").read_text().split() == ["one", "two", "three"]
    assert result.stderr.count("asking again: cannot get Pod/ppod-trainer-0 in namespace ppod: 503 down") == 1


def test_a_connection_that_is_dropped_without_a_word_is_noticed(api: FakeKubernetes) -> None:
    """By the kernel: nothing is sent while a log is silent."""
    del api
    with closing(Cluster("ppod", None)) as cluster:
        pools = cluster._api.rest_client.pool_manager.connection_pool_kw  # pyright: ignore
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in pools["socket_options"]


def test_a_log_that_cannot_be_read_ends_the_following(
    api: FakeKubernetes, k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_AWAY_S", 1.5)
    api.forbidden.add("/log")
    config = write(tmp_path / "t.yaml", {"steps": 1})
    with job_controller(api, ["one"], 0):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "ppod: the cluster does not let you read the log of Pod/ppod-trainer-0 in namespace ppod (403): "
    )
