"""Real service processes on free ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from support.forked import ForkedProcess

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0
IMPORT_ROOTS = ("protos", "services", "trainer", "deploy", "tests")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment, with our import roots and these variables."""
    roots = os.pathsep.join(str(ROOT / name) for name in IMPORT_ROOTS)
    return {**os.environ, "PYTHONPATH": roots, "PYTHONWARNINGS": "default", **(variables or {})}


@dataclass
class ServiceProcess:
    """A running service: its ports, its process and the file that takes its stderr."""

    port: int
    admin_port: int
    metrics_port: int
    process: ForkedProcess | subprocess.Popen[bytes]
    stderr_file: Path
    health_port: int = 0

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def admin_target(self) -> str:
        return f"127.0.0.1:{self.admin_port}"

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text() if self.stderr_file.is_file() else ""

    def log(self) -> list[dict[str, object]]:
        """Every line of stderr; a line that is not JSON fails the test."""
        return [json.loads(line) for line in self.stderr.splitlines()]

    def wait_for_event(self, event: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the service logs an event."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if f'"event": "{event}"' in self.stderr:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no event {event!r}; exit code {self.process.poll()}; stderr:\n{self.stderr}")

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)


def metrics_of(service: ServiceProcess) -> str:
    """The text of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{service.metrics_port}/metrics", timeout=10) as reply:
        return reply.read().decode()


def write_config(path: Path, values: Mapping[str, object]) -> Path:
    path.write_text(yaml.safe_dump(dict(values)))
    return path


def run_to_exit(module: str, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a service that is meant to end by itself."""
    with TemporaryDirectory() as directory:
        process = start_module(module, *arguments, directory=Path(directory))
        stdout, stderr = process.communicate(timeout_s)
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


def start_module(
    module: str,
    *arguments: str,
    directory: Path,
    name: str = "process",
    variables: Mapping[str, str] | None = None,
) -> ForkedProcess:
    """Start `python -m module arguments`; `directory` takes what it writes to stdout and stderr."""
    return ForkedProcess(
        module,
        arguments,
        environment=environment(variables),
        cwd=ROOT,
        stdout_file=directory / f"{name}.stdout",
        stderr_file=directory / f"{name}.stderr",
    )


@contextmanager
def running_service(
    module: str,
    directory: Path,
    values: Mapping[str, object],
    *,
    admin: bool = True,
    until: str = "ready",
    fresh: bool = False,
    start_timeout_s: float = START_TIMEOUT_S,
    variables: Mapping[str, str] | None = None,
) -> Iterator[ServiceProcess]:
    """Start `python -m module` on free ports, wait until it logs an event, and end it afterwards.

    With `fresh` it has an interpreter of its own, as users start it; else it is forked from one, which is faster.
    `variables` are of its environment, besides this process's.
    """
    port, admin_port, metrics_port, health_port = free_ports(4)
    listen = {"port": port, "metrics_port": metrics_port, "health_port": health_port}
    if admin:
        listen["admin_port"] = admin_port
    name = f"{module}-{port}"
    config = write_config(directory / f"{name}.yaml", {"listen": listen, **values})
    if fresh:
        with (directory / f"{name}.stderr").open("wb") as stderr:
            command = [sys.executable, "-m", module, "--config", str(config)]
            process = subprocess.Popen(
                command, env=environment(variables), cwd=ROOT, stderr=stderr, stdout=subprocess.DEVNULL
            )
    else:
        process = start_module(module, "--config", str(config), directory=directory, name=name, variables=variables)
    service = ServiceProcess(port, admin_port, metrics_port, process, directory / f"{name}.stderr", health_port)
    try:
        service.wait_for_event(until, start_timeout_s)
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
