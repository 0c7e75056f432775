"""What runs, how many of it, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from ppod_deploy.k8s import status_view
from ppod_trainer.config import MetricsConfig
from ppod_trainer.metrics import MetricsLog
from support.fake_kubernetes import FakeKubernetes
from support.processes import environment

from .conftest import Command, deployment_controller, pod

METRICS = """\
# HELP ppod_weight_version Version of the serving weights
# TYPE ppod_weight_version gauge
ppod_weight_version {version}
# TYPE ppod_queue_sequences gauge
ppod_queue_sequences 3.0
# TYPE ppod_queue_tokens gauge
ppod_queue_tokens 120.0
# TYPE ppod_team_served_tokens counter
ppod_team_served_tokens_total{{team="search"}} {served}
ppod_team_served_tokens_total{{team=""}} 5.0
# TYPE ppod_team_refused counter
ppod_team_refused_total{{reason="quota",team="search"}} 2.0
ppod_team_refused_total{{reason="queue",team="search"}} 1.0
# TYPE ppod_team_queue_tokens gauge
ppod_team_queue_tokens{{team="search"}} 40.0
"""


def deployment(component: str, replicas: int) -> dict[str, object]:
    labels = {"app.kubernetes.io/part-of": "ppod", "app.kubernetes.io/component": component}
    return {"metadata": {"name": f"ppod-{component}", "labels": labels}, "spec": {"replicas": replicas}}


@pytest.fixture
def running(api: FakeKubernetes) -> FakeKubernetes:
    """Two pods of generation on different weights, one that drains, and a trainer."""
    api.put("apps/v1", "deployments", "ppod", deployment("generation", 3))
    api.put("v1", "pods", "ppod", pod("ppod-generation-a", "generation"))
    api.put("v1", "pods", "ppod", pod("ppod-generation-b", "generation"))
    gone = pod("ppod-generation-c", "generation", ready=False)
    gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    api.put("v1", "pods", "ppod", gone)
    api.put("v1", "pods", "ppod", pod("ppod-trainer-x", "trainer", port=9104))
    api.put("v1", "pods", "ppod", {"metadata": {"name": "somebody-elses", "labels": {"app": "other"}}})
    api.metrics["ppod-generation-a:9101"] = METRICS.format(version=7.0, served=1000.0)
    api.metrics["ppod-generation-b:9101"] = METRICS.format(version=6.0, served=500.0)
    api.metrics["ppod-trainer-x:9104"] = "# TYPE ppod_step gauge\nppod_step 12.0\nppod_policy_version 7.0\n"
    return api


def test_status_tells_of_pods_weights_queues_gpus_and_teams(running: FakeKubernetes, k8s: Command) -> None:
    result = k8s("status", "--json")
    assert result.code == 0, result.stderr
    status = json.loads(result.stdout)
    assert status["wanted"] == {"generation": 3}
    first, second, leaving, trainer = status["pods"]
    assert first == {
        "component": "generation",
        "pod": "ppod-generation-a",
        "node": "node-1",
        "ready": True,
        "state": "Running",
        "restarts": 1,
        "age_s": first["age_s"],
        "gpus": 2,
        "version": 7,
        "waiting_sequences": 3,
        "waiting_tokens": 120,
        "step": None,
    }
    assert first["age_s"] > 150_000_000
    assert second["version"] == 6
    assert (leaving["state"], leaving["ready"], leaving["version"]) == ("Terminating", False, None)
    assert (trainer["step"], trainer["version"]) == (12, 7)
    [team] = status["teams"]
    assert team == {
        "component": "generation",
        "team": "search",
        "served_tokens": 1500,
        "waiting_tokens": 80,
        "refused": 6,
    }
    assert list(status["unread"]) == ["ppod-generation-c"]
    labels = {one.query["labelSelector"] for one in running.requests if "labelSelector" in one.query}
    assert labels == {"app.kubernetes.io/part-of=ppod"}
    assert len(running.seen("GET", "/pods/ppod-generation-a:9101/proxy/metrics")) == 1


@pytest.mark.parametrize(
    ("resource", "gpus"),
    [
        ("amd.com/gpu", 2),
        ("nvidia.com/gpu.shared", 2),
        ("nvidia.com/mig-3g.40gb", 2),
        ("nvidia.com/mig-1g.10gb.shared", 2),
        ("nvidia.com/gpumem", 0),
        ("memory", 0),
    ],
)
def test_parts_of_gpus_count_as_those_that_are_asked_for(
    api: FakeKubernetes, k8s: Command, resource: str, gpus: int
) -> None:
    asks = pod("ppod-generation-a", "generation")
    asks["spec"]["containers"][0]["resources"]["limits"] = {"cpu": "4", resource: "2"}
    api.put("v1", "pods", "ppod", asks)
    result = k8s("status", "--json")
    assert [one["gpus"] for one in json.loads(result.stdout)["pods"]] == [gpus]


def test_the_table_shows_the_same(running: FakeKubernetes, k8s: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    del running
    monkeypatch.setenv("COLUMNS", "160")
    result = k8s("status", "--once")
    assert result.code == 0, result.stderr
    assert "namespace ppod: generation 2/3" in result.stdout
    [row] = [line for line in result.stdout.splitlines() if "ppod-generation-b" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][:7] == [
        *("generation", "ppod-generation-b", "ready", "6", "3 (120 tokens)", "2", "1"),
    ]
    assert "step 12" in result.stdout
    assert "1,500" in result.stdout
    assert "metrics of ppod-generation-c could not be read: cannot proxy to Pod/ppod-generation-c:9101" in result.stdout


def test_a_trainer_that_has_not_measured_everything_is_shown(
    api: FakeKubernetes, k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it exports, not what a test makes up: figures that a step did not measure are NaN."""
    monkeypatch.setenv("COLUMNS", "160")
    api.put("v1", "pods", "ppod", pod("ppod-trainer-x", "trainer", port=9104))
    log = MetricsLog(tmp_path, MetricsConfig(port=None, tensorboard=False))
    api.metrics["ppod-trainer-x:9104"] = generate_latest(log.registry).decode()
    [trainer] = json.loads(k8s("status", "--json").stdout)["pods"]
    assert (trainer["step"], trainer["version"]) == (0, None)

    log.write(3, {"policy/version": 4.0})
    log.close()
    api.metrics["ppod-trainer-x:9104"] = generate_latest(log.registry).decode()
    [trainer] = json.loads(k8s("status", "--json").stdout)["pods"]
    assert (trainer["step"], trainer["version"]) == (3, 4)
    assert "step 3" in k8s("status", "--once").stdout


def test_the_table_stays_while_the_api_server_is_away(
    running: FakeKubernetes, k8s: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    looks: list[bool] = []

    def sleep(seconds: float) -> None:
        assert seconds == 5.0
        looks.append(running.unavailable)
        if len(looks) == 3:
            raise KeyboardInterrupt
        # Away at the second look, and at the third.
        running.unavailable = True

    monkeypatch.setattr(status_view.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        k8s("status", "--interval-s", "5")
    shown = capsys.readouterr().out
    assert looks == [False, True, True]
    assert "namespace ppod: generation 2/3" in shown
    assert "as of 0 s ago: cannot list Deployment/ in namespace ppod: 503 down" in shown


def test_only_the_first_rank_of_a_trainer_is_asked_for_figures(running: FakeKubernetes, k8s: Command) -> None:
    """The others of a JobSet have the port in their template, and nothing that listens there."""
    for rank in range(3):
        made = pod(f"ppod-trainer-rank-0-{rank}", "trainer", port=9104)
        made["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": str(rank)}
        running.put("v1", "pods", "ppod", made)
    running.metrics["ppod-trainer-rank-0-0:9104"] = "# TYPE ppod_step gauge\nppod_step 3.0\n"
    status = json.loads(k8s("status", "--json").stdout)
    steps = {one["pod"]: one["step"] for one in status["pods"] if "-rank-" in one["pod"]}
    assert steps == {"ppod-trainer-rank-0-0": 3, "ppod-trainer-rank-0-1": None, "ppod-trainer-rank-0-2": None}
    assert list(status["unread"]) == ["ppod-generation-c"]


def test_scale_patches_one_number_and_waits(api: FakeKubernetes, k8s: Command) -> None:
    api.put("apps/v1", "deployments", "ppod", deployment("reward", 1))
    deployment_controller(api)
    begun = time.monotonic()
    result = k8s("scale", "reward", "4")
    assert result.code == 0, result.stderr
    assert time.monotonic() - begun > 0.2
    [patch] = api.seen("PATCH", "")
    assert patch.path == "/apis/apps/v1/namespaces/ppod/deployments/ppod-reward/scale"
    assert patch.body == {"spec": {"replicas": 4}}
    assert api.get("apps/v1", "deployments", "ppod", "ppod-reward")["spec"]["replicas"] == 4
    assert "$ kubectl -n ppod scale deployment/ppod-reward --replicas=4" in result.stderr
    assert result.stdout == "ppod-reward has 4 replicas\n"


def test_a_wait_outlasts_an_api_server_that_is_replaced(api: FakeKubernetes, k8s: Command) -> None:
    api.put("apps/v1", "deployments", "ppod", deployment("reward", 1))

    def asked(count: int) -> None:
        until = time.monotonic() + 20.0
        while len(api.requests) < count and time.monotonic() < until:
            time.sleep(0.01)

    def replace_server() -> None:
        while not api.seen("GET", "/deployments/ppod-reward"):
            time.sleep(0.01)
        api.unavailable = True
        asked(len(api.requests) + 2)
        counts = {"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}
        made = deployment("reward", 2)
        api.put("apps/v1", "deployments", "ppod", {**made, "status": counts})
        api.unavailable = False

    replacing = threading.Thread(target=replace_server)
    replacing.start()
    result = k8s("scale", "reward", "2")
    replacing.join()
    assert result.code == 0, result.stderr
    assert result.stdout == "ppod-reward has 2 replicas\n"


def test_logs_of_all_pods_carry_their_names(api: FakeKubernetes, k8s: Command) -> None:
    for name in ("ppod-reward-a", "ppod-reward-b"):
        api.put("v1", "pods", "ppod", pod(name, "reward"))
        api.log(name, "one", "two")
    result = k8s("logs", "reward")
    assert result.stdout.splitlines() == [
        "[ppod-reward-a] one",
        "[ppod-reward-a] two",
        "[ppod-reward-b] one",
        "[ppod-reward-b] two",
    ]
    assert {one.query["tailLines"] for one in api.seen("GET", "/log")} == {"100"}


def test_logs_are_followed_to_their_end(api: FakeKubernetes, k8s: Command) -> None:
    api.put("v1", "pods", "ppod", pod("ppod-reward-a", "reward"))

    def write() -> None:
        for number in range(3):
            time.sleep(0.1)
            api.log("ppod-reward-a", f"line {number}", ended=number == 2)

    writing = threading.Thread(target=write)
    writing.start()
    result = k8s("logs", "reward", "-f", "--tail", "-1")
    writing.join()
    assert result.stdout.splitlines() == [f"[ppod-reward-a] line {number}" for number in range(3)]
    [request] = api.seen("GET", "/log")
    assert request.query.get("follow") == "true"
    assert "tailLines" not in request.query


def test_logs_that_nobody_reads_on_end(api: FakeKubernetes) -> None:
    """As of `ppod k8s logs -f reward | grep -m 1 ...`, also where another pod is silent."""
    for name in ("ppod-reward-a", "ppod-reward-b"):
        api.put("v1", "pods", "ppod", pod(name, "reward"))
    api.log("ppod-reward-a", "one")
    command = [sys.executable, "-m", "ppod_deploy", "k8s", "logs", "-f", "reward"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "[ppod-reward-a] one\n"
        process.stdout.close()
        api.log("ppod-reward-a", "two")
        try:
            assert process.wait(30) == 1
        finally:
            process.kill()
        [line] = process.stderr.read().splitlines()
        assert line.startswith("$ kubectl -n ppod logs ")


@pytest.mark.parametrize("options", [("-f",), ()])
def test_logs_for_which_a_disk_has_no_room_end(api: FakeKubernetes, options: tuple[str, ...]) -> None:
    """As of `ppod k8s logs -f reward > /full/disk`, also where another pod is silent."""
    for name in ("ppod-reward-a", "ppod-reward-b"):
        api.put("v1", "pods", "ppod", pod(name, "reward"))
    api.log("ppod-reward-a", "one")
    command = [sys.executable, "-m", "ppod_deploy", "k8s", "logs", *options, "reward"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment(), text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["ppod: cannot write: No space left on device"]


def test_troubles_are_one_line_and_an_exit_code(
    api: FakeKubernetes, k8s: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = k8s("scale", "reward", "2")
    assert absent.code == 1
    assert absent.stderr.splitlines()[-1] == "ppod: there is no Deployment/ppod-reward in namespace ppod"
    assert k8s("scale", "bogus", "2").code == 2
    assert k8s("logs", "reward").stderr.splitlines()[-1] == "ppod: reward has no pod in namespace ppod"

    api.forbidden.add("GET /api/v1/namespaces/ppod/pods")
    refused = k8s("status", "--once")
    assert refused.code == 1
    assert refused.stderr.splitlines()[-1].startswith(
        "ppod: the cluster does not let you list Pod/ in namespace ppod (403): "
    )
    monkeypatch.setenv("KUBECONFIG", "/nowhere/kubeconfig")
    lost = k8s("status", "--once")
    assert lost.code == 1
    assert lost.stderr.splitlines()[-1].startswith("ppod: no cluster is configured: ")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("scale", "reward", "-1"), "replicas: expected 0 or more, found -1"),
        (("status", "--interval-s", "-1"), "--interval-s: expected seconds above 0, found -1"),
        (("status", "--interval-s", "nan"), "--interval-s: expected seconds above 0, found nan"),
        (("status", "--interval-s", "inf"), "--interval-s: expected seconds above 0, found inf"),
    ],
)
def test_numbers_that_mean_nothing_are_the_command_lines_fault(
    api: FakeKubernetes, k8s: Command, arguments: tuple[str, ...], fault: str
) -> None:
    result = k8s(*arguments)
    assert (result.code, result.stderr) == (2, f"ppod: command line: 1 problem\n  {fault}\n")
    assert api.requests == []
