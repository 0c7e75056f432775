"""A run as a Job: what is submitted, and what comes back of it."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import yaml

from deploy.manifests import policies
from ppod_models.configuration import parse_config
from ppod_trainer import job
from ppod_trainer.config import TrainerConfig
from support.fake_kubernetes import FakeKubernetes, Object, Place, Request
from support.manifests import combined, overlay, workload

from .conftest import Command, pod

LABELS = {
    "app.kubernetes.io/name": "ppod",
    "app.kubernetes.io/component": "trainer",
    "app.kubernetes.io/part-of": "ppod",
}


@contextmanager
def job_controller(
    api: FakeKubernetes, lines: list[str], *exit_codes: int, before: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Give each Job a pod for each exit code, one after the other; the connection of each one's log breaks once."""
    threads: list[threading.Thread] = []

    def run(name: str) -> None:
        before(name)
        for number, exit_code in enumerate(exit_codes):
            made = pod(f"{name}-{number}", "trainer", port=9104)
            made["metadata"]["labels"]["job-name"] = name
            made["metadata"]["ownerReferences"] = [api.get("batch/v1", "jobs", "ppod", name)["metadata"]]
            api.put("v1", "pods", "ppod", made)
            api.log_cuts[f"{name}-{number}"] = 4
            api.log(f"{name}-{number}", *lines, ended=True)
            made["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": exit_code}}
            made["status"]["phase"] = "Failed" if exit_code else "Succeeded"
            api.put("v1", "pods", "ppod", made)
        ended = api.get("batch/v1", "jobs", "ppod", name)
        ended["status"] = {"conditions": [{"type": "Failed" if exit_codes[-1] else "Complete", "status": "True"}]}
        api.put("batch/v1", "jobs", "ppod", ended)

    def react(request: Request, place: Place, stored: Object) -> None:
        del request
        if place.plural == "jobs":
            threads.append(threading.Thread(target=run, args=(stored["metadata"]["name"],)))
            threads[-1].start()

    api.controllers.append(react)
    yield
    for thread in threads:
        thread.join()


def result_lines(directory: Path) -> list[str]:
    """What the trainer's Job writes of a run's results."""
    out = io.StringIO()
    with redirect_stdout(out):
        for path in sorted(directory.iterdir()):
            job._write(path.name, path.read_bytes())  # pyright: ignore[reportPrivateUsage]
    return out.getvalue().splitlines()


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_run_is_submitted_followed_and_fetched(
    api: FakeKubernetes, k8s: Command, tmp_path: Path, exit_code: int
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    metrics = "".join(json.dumps({"step": step, "score/mean": step / 7}) + "\n" for step in range(5_000))
    (results / "metrics.jsonl").write_text(metrics)
    (results / "report.txt").write_text("score 0.1 -> 1.4\n")
    lines = ["step 1/2", "step 2/2", *result_lines(results)]
    assert sum(line.startswith("ppod-result metrics.jsonl") for line in lines) > 1
    services = {"reward": "127.0.0.1:50051", "reference": "elsewhere:1"}
    config = write(tmp_path / "run.yaml", {"trainer": {"steps": 7, "services": services}, "reward": {}})
    with job_controller(api, lines, exit_code):
        result = k8s(
            *("train", "--config", str(config), "--name", "run-1", "--image", "here/trainer:1"),
            *("--output", str(tmp_path / "out")),
        )
    assert result.code == exit_code, result.stderr
    assert [one.path for one in api.seen("PATCH", "")] == [
        "/api/v1/namespaces/ppod/configmaps/run-1",
        "/apis/batch/v1/namespaces/ppod/jobs/run-1",
        "/api/v1/namespaces/ppod/configmaps/run-1",
    ]
    config_map, submitted, owned = (one.body for one in api.seen("PATCH", ""))
    # It goes with its Job, and is the same else.
    uid = api.get("batch/v1", "jobs", "ppod", "run-1")["metadata"]["uid"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "run-1", "uid": uid}
    assert owned["metadata"].pop("ownerReferences") == [owner]
    assert owned == config_map
    sent = parse_config(TrainerConfig, yaml.safe_load(config_map["data"]["trainer.yaml"]), "sent")
    assert (sent.steps, str(sent.run_dir)) == (7, "/runs/run-1")
    assert sent.services.reward == "k8s:///ppod-reward:grpc"
    assert sent.services.reference == "elsewhere:1"
    assert sent.services.generation_admin == "k8s:///ppod-generation:admin"
    assert (sent.metrics.host, sent.metrics.port) == ("0.0.0.0", 9104)
    spec = submitted["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["image"] == "here/trainer:1"
    assert container["args"] == ["ppod_trainer.job", "--config", "/etc/ppod/trainer.yaml"]
    assert {"name": "config", "configMap": {"name": "run-1"}} in spec["volumes"]
    assert submitted["metadata"]["labels"] == LABELS

    assert "step 1/2\nstep 2/2\n" in result.stdout
    assert "the log broke off, asking again: " in result.stderr
    assert len(api.seen("GET", "/log")) > 1
    assert "ppod-result" not in result.stdout
    assert f"Job/run-1 ended with exit code {exit_code}" in result.stdout
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == metrics
    assert (tmp_path / "out" / "report.txt").read_text() == "score 0.1 -> 1.4\n"
    assert (tmp_path / "out" / "trainer.log").read_text() == "step 1/2\nstep 2/2\n"
    assert "$ kubectl -n ppod logs -f job/run-1" in result.stderr
    assert f"--field-manager=ppod -f {tmp_path / 'out' / 'job.yaml'}" in result.stderr
    assert list(yaml.safe_load_all((tmp_path / "out" / "job.yaml").read_text())) == [config_map, submitted]


def test_what_the_pod_will_not_find_is_named(
    api: FakeKubernetes, k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del api
    (tmp_path / "prompts.txt").write_text("Once\n")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "gae").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = {"prompts": {"path": "prompts.txt"}, "policy": {"source": "runs/model"}, "run_dir": "runs/model"}
    config = write(tmp_path / "t.yaml", {"steps": 3, **trainer})
    result = k8s("train", "--config", str(config), "--dry-run")
    assert result.code == 0
    told = [line.split(" is on this machine")[0] for line in result.stderr.splitlines() if "is on this machine" in line]
    assert told == ["policy.source: runs/model", "prompts.path: prompts.txt"]


def test_a_text_too_long_for_a_path_is_none(k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    services = {"reward": ",".join(f"10.0.0.{number}:50051" for number in range(30))}
    environment = {"name": "calculator", "parameters": {"notation": "~nobody-here/is about"}}
    trainer = {"services": services, "policy": {"source": "~/"}, "environment": environment}
    result = k8s("train", "--config", str(write(tmp_path / "t.yaml", trainer)), "--dry-run")
    assert (result.code, result.stderr.count("on this machine")) == (0, 1), result.stderr
    assert "policy.source: ~/ is on this machine; the pod needs it in its image or on a volume" in result.stderr


def test_a_dry_run_prints_what_kubectl_can_apply(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 3})
    result = k8s("train", "--config", str(config), "--dry-run")
    assert result.code == 0
    config_map, job_manifest = yaml.safe_load_all(result.stdout)
    assert (config_map["kind"], job_manifest["kind"]) == ("ConfigMap", "Job")
    over = write(tmp_path / "over.yaml", {"seed": 4})
    laid = k8s("train", "--config", str(config), "--config", str(over), "--dry-run")
    sent = yaml.safe_load(next(yaml.safe_load_all(laid.stdout))["data"]["trainer.yaml"])
    assert (sent["steps"], sent["seed"]) == (3, 4)
    nothing = k8s("train", "--dry-run")
    assert (nothing.code, "--config: required, but missing" in nothing.stderr) == (2, True)
    assert result.stderr.splitlines()[0].endswith("--field-manager=ppod -f -")
    assert api.requests == []


def test_the_packaged_job_may_watch_pods_as_an_overlays_may(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    """The account is the overlay's, which gives its token to no pod that does not ask for it."""
    config = write(tmp_path / "t.yaml", {"steps": 1})
    assert k8s("train", "--config", str(config), "--no-follow").code == 0
    submitted = api.seen("PATCH", "/jobs/")[0].body
    objects = [*(one for one in overlay("cpu") if one["kind"] != "Job"), submitted]
    assert list(policies.least_privilege(objects)) == []
    assert list(policies.restricted(objects)) == []


def test_the_packaged_job_runs_the_image_that_overlays_run(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    """A name without a tag is `latest`, which a node asks a registry for, whatever it was given by hand."""
    config = write(tmp_path / "t.yaml", {"steps": 1})
    assert k8s("train", "--config", str(config), "--no-follow").code == 0
    [container] = api.seen("PATCH", "/jobs/")[0].body["spec"]["template"]["spec"]["containers"]
    wanted = workload(overlay("cpu"), "trainer").container
    for key in ("image", "imagePullPolicy"):
        assert container[key] == wanted[key]


def test_the_packaged_job_ends_as_an_overlays_does(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 1})
    assert k8s("train", "--config", str(config), "--no-follow").code == 0
    made, wanted = (
        api.seen("PATCH", "/jobs/")[0].body["spec"]["template"]["spec"],
        workload(overlay("cpu"), "trainer").pod,
    )
    for key in ("terminationGracePeriodSeconds", "restartPolicy", "shareProcessNamespace"):
        assert made[key] == wanted[key]


def test_a_pod_that_the_job_replaces_is_followed_by_the_next(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 1})
    with job_controller(api, ["one", "two", "three", "four", "five"], 137, 0):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 0, result.stderr
    assert (tmp_path / "out" / "trainer.log").read_text().split() == ["one", "two", "three", "four", "five"] * 2
    assert {one.path.split("/")[-2] for one in api.seen("GET", "/log")} == {"ppod-trainer-0", "ppod-trainer-1"}


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_pod_that_is_deleted_is_followed_by_the_next(
    api: FakeKubernetes, k8s: Command, tmp_path: Path, exit_code: int
) -> None:
    """As on a node that is drained: the pod goes with its log, and the Job starts another."""
    config = write(tmp_path / "t.yaml", {"steps": 1})

    def drain(name: str) -> None:
        made = pod(f"{name}-gone", "trainer", port=9104)
        made["metadata"]["labels"]["job-name"] = name
        api.put("v1", "pods", "ppod", made)
        api.log(f"{name}-gone", "one")
        while not api.seen("GET", f"{name}-gone/log"):
            time.sleep(0.01)
        api.delete("v1", "pods", "ppod", f"{name}-gone")
        api.log(f"{name}-gone", ended=True)

    with job_controller(api, ["two"], exit_code, before=drain):
        result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == exit_code, result.stderr
    assert (tmp_path / "out" / "trainer.log").read_text().split() == ["one", "two"]
    assert "pod ppod-trainer-gone is gone" in result.stderr


def test_a_job_whose_last_pod_was_deleted_has_no_exit_code(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 1})

    def react(request: Request, place: Place, stored: Object) -> None:
        del request
        if place.plural == "jobs" and not api.seen("GET", "/log"):
            made = pod("p", "trainer", port=9104)
            made["metadata"]["labels"]["job-name"] = stored["metadata"]["name"]
            api.put("v1", "pods", "ppod", made)
            threading.Thread(target=end, args=(stored["metadata"]["name"],)).start()

    def end(name: str) -> None:
        while not api.seen("GET", "p/log"):
            time.sleep(0.01)
        ended = api.get("batch/v1", "jobs", "ppod", name)
        ended["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
        api.put("batch/v1", "jobs", "ppod", ended)
        api.delete("v1", "pods", "ppod", "p")
        api.log("p", ended=True)

    api.controllers.append(react)
    result = k8s("train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert result.code == 1
    assert result.stderr.splitlines()[-1] == (
        "ppod: Job/ppod-trainer has ended; its last pod, p, is gone, and its exit code and results with it"
    )


def test_the_job_of_an_overlay_keeps_what_components_added(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    sources = [{"configMap": {"name": "ppod-trainer-abc"}}, {"secret": {"name": "token"}}]
    container = {"name": "trainer", "image": "gpu", "volumeMounts": [{"name": "config", "mountPath": "/etc/ppod"}]}
    volumes = [{"name": "config", "projected": {"defaultMode": 288, "sources": sources}}, {"name": "runs"}]
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    job_manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "ppod-trainer"},
        "spec": {"template": {"spec": {"containers": [container], "volumes": volumes}}},
    }
    write(overlay / "job.yaml", job_manifest)
    write(overlay / "service.yaml", {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}})
    write(overlay / "kustomization.yaml", {"resources": ["job.yaml", "service.yaml"]})
    config = write(tmp_path / "t.yaml", {"steps": 1})
    assert k8s("train", "--config", str(config), "--name", "r", "--job", str(overlay), "--no-follow").code == 0
    assert len(api.seen("PATCH", "")) == 3
    spec = api.seen("PATCH", "/jobs/")[0].body["spec"]["template"]["spec"]
    expected = {"defaultMode": 288, "sources": [{"configMap": {"name": "r"}}, {"secret": {"name": "token"}}]}
    assert spec["volumes"] == [{"name": "config", "projected": expected}, {"name": "runs"}]
    assert spec["containers"][0]["image"] == "gpu"


def test_settings_that_components_lay_over_the_configuration_stay(
    api: FakeKubernetes, k8s: Command, tmp_path: Path
) -> None:
    combined(tmp_path / "overlay", "base", ["tls", "teams"])
    config = write(tmp_path / "t.yaml", {"steps": 1})
    result = k8s("train", "--config", str(config), "--name", "r", "--job", str(tmp_path / "overlay"), "--no-follow")
    assert result.code == 0, result.stderr
    spec = api.seen("PATCH", "/jobs/")[0].body["spec"]["template"]["spec"]
    [container] = spec["containers"]
    files = ["trainer.yaml", "tls-trainer.yaml", "teams-trainer.yaml"]
    flags = [argument for file in files for argument in ("--config", f"/etc/ppod/{file}")]
    assert container["args"] == ["ppod_trainer.job", *flags]
    sources = spec["volumes"][0]["projected"]["sources"]
    assert sources[0] == {"configMap": {"name": "r"}}
    shown = {item["path"] for source in sources[1:] for one in source.values() for item in one["items"]}
    certificates = {"tls/tls.crt", "tls/tls.key", "tls/ca.crt"}
    assert shown == {"tls-trainer.yaml", "teams-trainer.yaml", "token/token", *certificates}


def test_a_manifest_of_ones_own(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    container = {"name": "t", "image": "mine", "volumeMounts": [{"name": "etc", "mountPath": "/etc/ppod"}]}
    volumes = [
        {"name": "etc", "configMap": {"name": "other"}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": "r"}},
    ]
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x", "labels": {"team": "search"}},
        "spec": {"template": {"spec": {"containers": [container], "volumes": volumes}}},
    }
    config = write(tmp_path / "t.yaml", {"steps": 1})
    arguments = ("train", "--config", str(config), "--job", str(write(tmp_path / "job.yaml", manifest)), "--no-follow")
    assert k8s(*arguments).code == 0
    sent = api.seen("PATCH", "/jobs/")[0].body
    assert sent["metadata"]["labels"] == {"team": "search", **LABELS}
    spec = sent["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == "mine"
    assert spec["volumes"] == [
        {"name": "etc", "configMap": {"name": "ppod-trainer"}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": "r"}},
    ]
    again = k8s(*arguments)
    assert again.code == 1
    assert again.stderr.splitlines()[-1] == (
        "ppod: Job/ppod-trainer is there already: give another --name, or remove it by "
        "`kubectl -n ppod delete job/ppod-trainer --cascade=foreground`"
    )


def test_what_is_wrong_is_named_before_anything_is_sent(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    wrong = write(tmp_path / "wrong.yaml", {"stepz": 1, "seed": -1})
    result = k8s("train", "--config", str(wrong))
    assert result.code == 2
    assert "stepz: unknown key" in result.stderr
    assert "seed:" in result.stderr
    right = write(tmp_path / "right.yaml", {"steps": 1})
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}}
    no_job = k8s("train", "--config", str(right), "--job", str(write(tmp_path / "service.yaml", service)))
    assert no_job.code == 1
    assert "service.yaml holds 0 Jobs; expected one" in no_job.stderr
    assert api.requests == []
    nowhere = k8s("train", "--config", str(right), "--output", str(right))
    assert nowhere.code == 1
    assert nowhere.stderr.splitlines()[-1] == f"ppod: --output: {right} cannot be written: File exists"
    assert api.seen("PATCH", "") == []


@pytest.mark.parametrize("name", ["Bad_Name", "", "a/../../b", "-a", "a-", "a..b", "a" * 64, "a\n"])
def test_a_name_that_no_job_can_have_is_refused(api: FakeKubernetes, k8s: Command, tmp_path: Path, name: str) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 1})
    result = k8s("train", "--config", str(config), f"--name={name}", "--dry-run")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == (
        "ppod: command line: 1 problem\n  --name: expected at most 63 lower-case letters, digits, '-' and '.', "
        f"first and last a letter or digit, found {name!r}\n"
    )
    assert api.requests == []


@pytest.mark.parametrize("name", ["a", "run-1", "search.run-1", "1", "a" * 63])
def test_a_name_that_a_job_can_have_is_taken(k8s: Command, tmp_path: Path, name: str) -> None:
    config = write(tmp_path / "t.yaml", {"steps": 1})
    result = k8s("train", "--config", str(config), f"--name={name}", "--dry-run")
    assert result.code == 0
    assert [one["metadata"]["name"] for one in yaml.safe_load_all(result.stdout)] == [name, name]


def test_a_pod_that_cannot_start_says_why(api: FakeKubernetes, k8s: Command, tmp_path: Path) -> None:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
    waiting = pod("ppod-trainer-x", "trainer", status={"phase": "Pending", "conditions": [condition]})
    waiting["metadata"]["labels"]["job-name"] = "ppod-trainer"
    api.put("v1", "pods", "ppod", waiting)
    config = write(tmp_path / "t.yaml", {"steps": 1})
    result = k8s("train", "--config", str(config), "--timeout-s", "0.3")
    assert result.code == 1
    assert result.stderr.splitlines()[-1] == (
        "ppod: Job/ppod-trainer did not start within 0.3 s: Unschedulable: "
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )
