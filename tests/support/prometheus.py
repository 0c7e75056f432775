"""A real Prometheus server that scrapes processes of a test, with ppod's own rules, hurried up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.processes import ROOT, free_ports

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="needs Debian's package prometheus, which .ci/system-packages installs",
)
RULES = ROOT / "deploy" / "monitoring" / "rules"


@dataclass(frozen=True)
class Target:
    """What a monitor of Kubernetes would find: a pod with a port of metrics."""

    component: str
    pod: str
    port: int
    namespace: str = "ppod"


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    port: int

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=10) as reply:
            return json.load(reply)["data"]

    def firing(self) -> list[dict[str, str]]:
        """The labels of every alert that fires."""
        return [alert["labels"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"]

    def wait_for(
        self, wanted: Mapping[str, Mapping[str, str]], meanwhile: Callable[[], None], timeout_s: float
    ) -> None:
        """Wait until each alert fires with these labels; `meanwhile` is called again and again."""
        until = time.monotonic() + timeout_s
        missing: list[str] = []
        while time.monotonic() < until:
            meanwhile()
            found = self.firing()
            missing = [
                name
                for name, labels in wanted.items()
                if not any(one["alertname"] == name and not labels.items() - one.items() for one in found)
            ]
            if not missing:
                return
            time.sleep(0.2)
        raise AssertionError(f"{missing} do not fire; firing: {found}; alerts: {self.get('alerts')}")


def hurried(text: str) -> str:
    """Rules whose windows are seconds, and which wait no more than that."""
    text = re.sub(r"\[\d+m\]", "[5s]", text)
    text = re.sub(r"\boffset \d+m\b", "offset 3s", text)
    text = re.sub(r"^( +for:) .*$", r"\1 1s", text, flags=re.MULTILINE)
    return re.sub(r"^( +interval:) .*$", r"\1 500ms", text, flags=re.MULTILINE)


@contextmanager
def scraping(directory: Path, targets: Sequence[Target]) -> Iterator[Prometheus]:
    """Run `prometheus` over the targets; files go to the directory."""
    directory.mkdir()
    for path in RULES.glob("*.rules.yaml"):
        (directory / path.name).write_text(hurried(path.read_text()))
    static = [
        {
            "targets": [f"127.0.0.1:{one.port}"],
            "labels": {"namespace": one.namespace, "component": one.component, "pod": one.pod},
        }
        for one in targets
    ]
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["*.rules.yaml"],
        "scrape_configs": [{"job_name": "ppod", "static_configs": static}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        shutil.which("prometheus") or "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_ready(process, port, directory / "log")
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait(30)


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"prometheus does not start:\n{log.read_text()}")
