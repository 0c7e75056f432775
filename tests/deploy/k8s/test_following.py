"""A run that is followed, though what is asked does not always answer."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from ppod_deploy.k8s import log_place, train
from ppod_deploy.k8s.cluster import Cluster
from ppod_deploy.k8s.log_place import LogPlace
from support.fake_kubernetes import FakeKubernetes

from .conftest import Command, pod
from .test_train import job_controller, result_lines, write


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


def test_a_log_that_was_rotated_while_its_connection_was_broken_goes_on(
    api: FakeKubernetes, k8s: Command, tmp_path: Path
) -> None:
    """It then begins at a later line, with which nothing tells how many were before it."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "metrics.jsonl").write_text("{}\n")
    (results / "report.txt").write_text("score\n")
    whole, broken = result_lines(results)
    config = write(tmp_path / "t.yaml", {"steps": 1})
    api.log_rotated["ppod-trainer-0"] = 2
    lines = ["one", "one", "three", "four", whole, broken[:-8]]
    with job_controller(api, lines, 0):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 0, result.stderr
    out = tmp_path / "out"
    assert (out / "trainer.log").read_text().split() == ["one", "one", "three", "four"]
    assert (out / "metrics.jsonl").read_text() == "{}\n"
    assert "report.txt did not come whole (" in result.stderr
    assert not (out / "report.txt").exists()


def test_a_pod_of_an_earlier_job_of_the_name_is_not_followed(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    """A Job that is deleted is gone before its pods, which write a checkpoint yet."""
    earlier = pod("ppod-trainer-x", "trainer", port=9104)
    earlier["metadata"] |= {
        "labels": {**earlier["metadata"]["labels"], "job-name": "ppod-trainer"},
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "ppod-trainer", "uid": "gone"}],
        "deletionTimestamp": "2026-01-01T00:00:00Z",
    }
    earlier["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 143}}
    api.put("v1", "pods", "ppod", earlier)
    api.log("ppod-trainer-x", "of the earlier run", ended=True)
    config = write(tmp_path / "t.yaml", {"steps": 1})
    with job_controller(api, ["one"], 0):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 0, result.stderr
    assert (tmp_path / "out" / "trainer.log").read_text() == "one\n"


def test_a_pod_that_was_killed_while_it_wrote_a_result_has_its_exit_code(
    api: FakeKubernetes, k8s: Command, tmp_path: Path
) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 1})
    with job_controller(api, ["one", "ppod-result report.t"], 137):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 137
    assert (tmp_path / "out" / "trainer.log").read_text() == "one\nppod-result report.t\n"
    assert not (tmp_path / "out" / "report.t").exists()


@pytest.mark.parametrize(
    ("lines", "new"),
    [
        # Fractions without their last zeros, and streams that are stamped apart.
        (["05.5Z a", "05.51Z b", "05.500000001Z c"], ["a", "b", "c"]),
        (["05.5Z a", "05.5Z a", "05.5Z b", "06Z c", "05.9Z d"], ["a", "b", "c", "d"]),
        # The first two, too.
        (["05.5Z a", "05.49Z b", "05.49Z b", "06Z c"], ["a", "b", "c"]),
        (["05.5Z ", "06.5+02:00 two  words ", "06.5+02:00 two  words "], ["", "two  words "]),
    ],
)
def test_lines_are_told_by_their_timestamps(lines: list[str], new: list[str]) -> None:
    place = LogPlace()
    assert [text for line in lines if (text := place.read(f"2026-01-01T00:00:{line}")) is not None] == new
    assert [place.read("the node's own words")] * 2 == ["the node's own words"] * 2


def test_lines_before_all_that_are_remembered_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_place, "_RECENT", 2)
    place = LogPlace()
    lines = ["05.5Z a", "05.6Z b", "05.7Z c", "05.5Z a", "05.6Z b", "05.59Z d", "05.65Z e"]
    told = [text for line in lines if (text := place.read(f"2026-01-01T00:00:{line}")) is not None]
    assert told == ["a", "b", "c", "e"]


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
