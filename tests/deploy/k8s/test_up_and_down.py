"""Overlays become objects and go again, by server-side apply; and the kubectl lines that do the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ppod_deploy.k8s.overlays import kubectl_path, read_overlay
from support.fake_kubernetes import FakeKubernetes

from .conftest import OVERLAY, Command, deployment_controller

APPLY = "kubectl -n ppod apply --server-side --force-conflicts --field-manager=ppod"


def test_up_applies_the_rendered_overlay_and_waits(api: FakeKubernetes, k8s: Command) -> None:
    deployment_controller(api)
    result = k8s("up", "--overlay", str(OVERLAY))
    assert result.code == 0, result.stderr
    patches = api.seen("PATCH", "")
    [config_map] = [one.path for one in patches if "configmaps" in one.path]
    assert [one.path for one in patches] == [
        "/api/v1/namespaces/ppod",
        config_map,
        "/api/v1/namespaces/ppod/services/ppod-reward",
        "/apis/apps/v1/namespaces/ppod/deployments/ppod-reward",
    ]
    assert {one.content_type for one in patches} == {"application/apply-patch+yaml"}
    assert {(one.query["fieldManager"], one.query["force"]) for one in patches} == {("ppod", "true")}
    # The name that kustomize generated is the one that the Deployment refers to.
    [container] = patches[-1].body["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"][0]["configMapRef"]["name"] == config_map.rsplit("/", 1)[1]
    assert result.stdout.splitlines()[-1] == "ready: ppod-reward"
    assert f"$ {APPLY} -k {OVERLAY}" in result.stderr
    assert "$ kubectl -n ppod rollout status deployment/ppod-reward --timeout=1800s" in result.stderr


def test_services_alone_leave_the_run_to_be_submitted(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    job = "---\napiVersion: batch/v1\nkind: Job\nmetadata: {name: ppod-trainer}\n"
    overlay = tmp_path / "all.yaml"
    overlay.write_text((OVERLAY / "reward.yaml").read_text() + job)
    result = k8s("up", "--overlay", str(overlay), "--services-only", "--no-wait")
    assert result.code == 0, result.stderr
    assert [one.path.rsplit("/", 1)[1] for one in api.seen("PATCH", "")] == ["ppod-reward", "ppod-reward"]
    assert result.stderr.splitlines()[0] == (
        f"""$ cat {overlay} | yq 'select(.kind != "Job" and .kind != "JobSet")' | {APPLY} -f -"""
    )


def test_the_kubectl_line_renders_the_same(tmp_path: Path) -> None:
    kubectl = kubectl_path()
    assert kubectl is not None
    rendered = subprocess.run([kubectl, "kustomize", str(OVERLAY)], capture_output=True, text=True, check=True).stdout
    (tmp_path / "all.yaml").write_text(rendered)
    from_file = read_overlay(str(tmp_path / "all.yaml"))
    assert from_file.manifests == read_overlay(str(OVERLAY)).manifests
    assert from_file.option == ("-f", str(tmp_path / "all.yaml"))


def test_a_dry_run_asks_nothing_of_the_cluster(api: FakeKubernetes, k8s: Command) -> None:
    for command in (
        ("up", "--overlay", str(OVERLAY)),
        ("down", "--overlay", str(OVERLAY)),
        ("scale", "reward", "3"),
        ("logs", "reward", "-f"),
        ("status",),
    ):
        result = k8s(*command, "--dry-run")
        assert (result.code, result.stdout) == (0, "")
        assert result.stderr.startswith("$ kubectl ")
    assert api.requests == []


@pytest.mark.parametrize("command", ["up", "down"])
def test_nothing_is_done_in_a_namespace_that_was_not_named(api: FakeKubernetes, k8s: Command, command: str) -> None:
    deployment_controller(api, after_s=0)
    result = k8s(command, "--overlay", str(OVERLAY), "--namespace", "staging")
    assert result.code == 1
    [message] = result.stderr.splitlines()
    assert "into namespace ppod, and --namespace is staging: give --namespace ppod, or change `namespace`" in message
    assert api.requests == []


def test_down_keeps_what_cannot_be_had_again(api: FakeKubernetes, k8s: Command) -> None:
    deployment_controller(api, after_s=0)
    assert k8s("up", "--overlay", str(OVERLAY)).code == 0
    result = k8s("down", "--overlay", str(OVERLAY))
    assert result.code == 0, result.stderr
    deletes = api.seen("DELETE", "")
    assert [one.path.rsplit("/", 2)[1] for one in deletes] == ["deployments", "services", "configmaps"]
    assert {one.body["propagationPolicy"] for one in deletes} == {"Background"}
    assert "kept Namespace/ppod; --everything deletes it too" in result.stdout
    assert "kubectl -n ppod delete --ignore-not-found deployment/ppod-reward service/ppod-reward" in result.stderr
    again = k8s("down", "--overlay", str(OVERLAY), "--everything")
    assert again.code == 0
    assert "Deployment/ppod-reward was not there" in again.stdout
    assert api.seen("DELETE", "")[-1].path == "/api/v1/namespaces/ppod"
    assert f"$ kubectl -n ppod delete --ignore-not-found -k {OVERLAY}" in again.stderr


def test_down_tells_how_to_wait_for_a_trainers_last_checkpoint(
    api: FakeKubernetes, k8s: Command, tmp_path: Path
) -> None:
    overlay = tmp_path / "all.yaml"
    overlay.write_text("apiVersion: batch/v1\nkind: Job\nmetadata: {name: ppod-trainer}\n")
    api.put("batch/v1", "jobs", "ppod", {"metadata": {"name": "ppod-trainer"}})
    assert k8s("down", "--overlay", str(overlay)).stdout.splitlines() == [
        "deleted Job/ppod-trainer",
        "a trainer that ran still writes its checkpoint; before another starts: kubectl -n ppod wait --for=delete pod "
        "-l app.kubernetes.io/part-of=ppod,app.kubernetes.io/component=trainer --timeout=20m",
    ]


def test_what_was_applied_before_an_unknown_kind_goes_again(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    """As of an overlay with a ServiceMonitor on a cluster without its operator."""
    overlay = tmp_path / "all.yaml"
    overlay.write_text(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: ppod-reward}\n---\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: ServiceMonitor\nmetadata: {name: ppod-services}\n"
    )
    up = k8s("up", "--overlay", str(overlay))
    assert up.code == 1
    assert "ppod: the cluster knows no ServiceMonitor of monitoring.coreos.com/v1" in up.stderr.splitlines()[-1]
    assert len(api.objects) == 1
    down = k8s("down", "--overlay", str(overlay))
    assert (down.code, down.stdout.splitlines()) == (
        0,
        ["ServiceMonitor/ppod-services was not there", "deleted ServiceAccount/ppod-reward"],
    )
    assert api.objects == {}


def test_a_namespace_that_is_not_there_is_what_is_missing(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    api.no_namespaces.add("ppod")
    overlay = tmp_path / "all.yaml"
    overlay.write_text("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: ppod-reward}\n")
    result = k8s("up", "--overlay", str(overlay))
    assert result.code == 1
    assert result.stderr.splitlines()[-1] == (
        'ppod: cannot patch ServiceAccount/ppod-reward: namespaces "ppod" not found'
    )
    assert k8s("down", "--overlay", str(overlay)).stdout == "ServiceAccount/ppod-reward was not there\n"


def test_what_never_gets_ready_is_named_with_its_reason(api: FakeKubernetes, k8s: Command) -> None:
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image: ppod-services"}}}
    labels = {"app.kubernetes.io/part-of": "ppod", "app.kubernetes.io/component": "reward"}
    stuck = {
        "metadata": {"name": "ppod-reward-5d-x", "labels": labels},
        "status": {"phase": "Pending", "containerStatuses": [waiting]},
    }
    api.put("v1", "pods", "ppod", stuck)
    result = k8s("up", "--overlay", str(OVERLAY), "--timeout-s", "0.5")
    assert result.code == 1
    assert result.stderr.splitlines()[-1] == (
        "ppod: ppod-reward not ready within 0.5 s; ppod-reward-5d-x: ImagePullBackOff: no such image: ppod-services"
    )


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("nowhere", "no overlay 'nowhere': it is no directory, no file, and none of those shipped"),
        ("{empty}", "holds no kustomization.yaml"),
        ("{broken}", "does not render: "),
        ("{text}", "a manifest lacks apiVersion, kind or metadata.name"),
        ("{bytes}", "bytes is no YAML: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("{date}", "date is no YAML: month must be in 1..12"),
        ("{brackets}", "brackets is no YAML: maximum recursion depth exceeded"),
        ("{unknown}", "the cluster knows no ServiceMonitor of monitoring.coreos.com/v1: install what defines it"),
    ],
)
def test_overlays_that_cannot_be_applied(
    api: FakeKubernetes, k8s: Command, tmp_path: Path, overlay: str, message: str
) -> None:
    del api
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "kustomization.yaml").write_text("resources: [not-there.yaml]\n")
    (tmp_path / "text").write_text("a: 1\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "date").write_text("a: 2024-13-01\n")
    (tmp_path / "brackets").write_text("[" * 10_000)
    monitor = "apiVersion: monitoring.coreos.com/v1\nkind: ServiceMonitor\nmetadata: {name: ppod}\n"
    (tmp_path / "unknown").write_text(monitor)
    places = {name: tmp_path / name for name in ("empty", "broken", "text", "bytes", "date", "brackets", "unknown")}
    result = k8s("up", "--overlay", overlay.format(**places))
    assert result.code == 1
    [line] = [one for one in result.stderr.splitlines() if one.startswith("ppod: ")]
    assert message in line
