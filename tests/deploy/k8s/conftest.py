"""`ppod k8s` against an API server over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ppod_deploy.cli import execute
from support.fake_kubernetes import FakeKubernetes, Object, Place, Request

OVERLAY = Path(__file__).with_name("overlay")


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


Command = Callable[..., Result]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    with FakeKubernetes().serving() as served:
        monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig(tmp_path / "kubeconfig")))
        yield served


@pytest.fixture
def k8s(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `ppod k8s` as its command line does, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        try:
            code = execute(["k8s", *arguments])
        except SystemExit as error:
            code = int(str(error.code))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def deployment_controller(api: FakeKubernetes, *, after_s: float = 0.2) -> None:
    """Let every Deployment become ready a little after it was written."""

    def react(request: Request, place: Place, stored: Object) -> None:
        del request
        if place.plural != "deployments":
            return
        generation = stored["metadata"].get("generation", 0) + 1
        stored["metadata"]["generation"] = generation
        replicas = stored["spec"]["replicas"]

        def ready() -> None:
            time.sleep(after_s)
            with api.changed:
                current = api.objects.get(place, {})
                counts = {"replicas": replicas, "updatedReplicas": replicas, "availableReplicas": replicas}
                current["status"] = {"observedGeneration": generation, **counts}

        threading.Thread(target=ready, daemon=True).start()

    api.controllers.append(react)


def pod(name: str, component: str, *, ready: bool = True, port: int = 9101, **changes: object) -> Object:
    return {
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/part-of": "ppod", "app.kubernetes.io/component": component},
            "creationTimestamp": "2020-01-01T00:00:00Z",
        },
        "spec": {
            "nodeName": "node-1",
            "containers": [
                {
                    "name": component,
                    "ports": [{"name": "metrics", "containerPort": port}],
                    "resources": {"limits": {"nvidia.com/gpu": "2"}},
                }
            ],
        },
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": component, "ready": ready, "restartCount": 1, "state": {"running": {}}}],
        },
        **changes,
    }
