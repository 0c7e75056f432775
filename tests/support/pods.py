"""Pods without a cluster: real service processes, each at an address of its own, and the endpoints that tell of them.

Addresses are 127.0.0.x, or those of network namespaces, whose links can be cut.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.endpoint_slices import EndpointController
from support.fake_kubernetes import FakeKubernetes
from support.forked import ForkedProcess
from support.processes import ROOT, environment, free_ports, write_config

_START_TIMEOUT_S = 90.0
_HOSTS = itertools.count(2)


class Network:
    """Where pods get their addresses."""

    def address(self) -> tuple[str, str | None]:
        """An address, and the network namespace that it is in."""
        return f"127.0.0.{next(_HOSTS)}", None

    def cut(self, host: str) -> None:
        """No packet reaches this address any more."""
        raise NotImplementedError

    def mend(self, host: str) -> None:
        raise NotImplementedError


class NamespacedNetwork(Network):
    """A network namespace for each pod, joined to this one by a pair of virtual devices. Needs root and `ip`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._links: dict[str, str] = {}
        # Two runs of the tests on one machine do not meet.
        self._prefix = f"pp{os.getpid()}"
        self._subnet = f"198.18.{os.getpid() % 250}"

    def address(self) -> tuple[str, str | None]:
        number = len(self._links) + 1
        name, link = f"{self._prefix}n{number}", f"{self._prefix}v{number}"
        # Addresses that are set aside for tests of networks (RFC 2544).
        here, host = f"{self._subnet}.{4 * number + 1}", f"{self._subnet}.{4 * number + 2}"
        run("ip", "netns", "add", name)
        self._stack.callback(run, "ip", "netns", "del", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._stack.callback(run, "ip", "link", "del", link)
        run("ip", "addr", "add", f"{here}/30", "dev", link)
        run("ip", "link", "set", link, "up")
        run("ip", "-n", name, "addr", "add", f"{host}/30", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        self._links[host] = name
        return host, name

    def cut(self, host: str) -> None:
        # On the pod's side: here the address stays reachable, and packets vanish, as they do in a network.
        run("ip", "-n", self._links[host], "link", "set", "eth0", "down")

    def mend(self, host: str) -> None:
        run("ip", "-n", self._links[host], "link", "set", "eth0", "up")
        # Neighbours that did not answer are asked again only after a while.
        run("ip", "neigh", "flush", "to", host)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class RunningPod:
    """One service process."""

    name: str
    host: str
    process: ForkedProcess
    stderr_file: Path

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text() if self.stderr_file.is_file() else ""


@dataclass
class Deployment:
    """The pods of one service, and their EndpointSlice."""

    service: str
    module: str
    values: Mapping[str, object]
    directory: Path
    network: Network
    endpoints: EndpointController
    ports: tuple[int, int, int]
    pods: dict[str, RunningPod] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self) -> RunningPod:
        """Start a pod; it is not ready yet."""
        name = f"{self.service}-{next(self._numbers)}"
        host, namespace = self.network.address()
        port, admin_port, metrics_port = self.ports
        listen = {"host": host, "port": port, "admin_port": admin_port, "metrics_port": metrics_port}
        values = {**self.values, "listen": listen, "tenancy": {"open_admin": True}}
        config = write_config(self.directory / f"{name}.yaml", values)
        process = ForkedProcess(
            self.module,
            ("--config", str(config)),
            environment=environment(),
            cwd=ROOT,
            stdout_file=self.directory / f"{name}.stdout",
            stderr_file=self.directory / f"{name}.stderr",
            network_namespace=namespace,
        )
        pod = RunningPod(name, host, process, self.directory / f"{name}.stderr")
        self.pods[name] = pod
        return pod

    def restart(self, pod: RunningPod) -> None:
        """Start a pod's container again, as the kubelet does: the same address, without what it had in memory."""
        pod.stderr_file = self.directory / f"{pod.name}-again.stderr"
        pod.process = ForkedProcess(
            self.module,
            ("--config", str(self.directory / f"{pod.name}.yaml")),
            environment=environment(),
            cwd=ROOT,
            stdout_file=self.directory / f"{pod.name}.stdout",
            stderr_file=pod.stderr_file,
        )

    def wait_ready(self, pod: RunningPod) -> None:
        """The readiness probe: when it succeeds, the endpoint is ready."""
        until = time.monotonic() + _START_TIMEOUT_S
        while '"event": "ready"' not in pod.stderr:
            assert pod.process.poll() is None, pod.stderr
            assert time.monotonic() < until, pod.stderr
            time.sleep(0.02)
        self.endpoints.ready(pod.name, pod.host)

    def up(self) -> RunningPod:
        """Start a pod and wait until it is ready."""
        pod = self.start()
        self.wait_ready(pod)
        return pod

    def drain(self, pod: RunningPod) -> int:
        """Delete a pod: endpoint and process learn of it at about the same time. Returns its exit code."""
        self.endpoints.terminating(pod.name)
        pod.process.send_signal(signal.SIGTERM)
        code = pod.process.wait(60)
        self.endpoints.gone(pod.name)
        return code

    def kill(self, pod: RunningPod) -> None:
        """SIGKILL; the control plane has not noticed yet."""
        pod.process.kill()
        pod.process.wait(30)


class Cluster:
    """Deployments that one API server tells of."""

    def __init__(self, api: FakeKubernetes, directory: Path, network: Network) -> None:
        self.api = api
        self.directory = directory
        self.network = network
        self.deployments: list[Deployment] = []

    def deploy(self, service: str, module: str, values: Mapping[str, object], replicas: int) -> Deployment:
        """Start a Service with so many ready pods."""
        ports = free_ports(3)
        named = dict(zip(("grpc", "admin", "metrics"), ports, strict=True))
        endpoints = EndpointController(self.api, service, named)
        made = Deployment(
            service, module, values, self.directory, self.network, endpoints, (ports[0], ports[1], ports[2])
        )
        self.deployments.append(made)
        started = [made.start() for _ in range(replicas)]
        for pod in started:
            made.wait_ready(pod)
        return made


@contextmanager
def running_cluster(directory: Path, *, namespaced: bool = False) -> Iterator[Cluster]:
    """An API server and no pods; all that are started are ended with it."""
    with ExitStack() as stack:
        network = NamespacedNetwork(stack) if namespaced else Network()
        api = stack.enter_context(FakeKubernetes().serving())
        cluster = Cluster(api, directory, network)
        try:
            yield cluster
        finally:
            for deployment in cluster.deployments:
                for pod in deployment.pods.values():
                    pod.process.kill()
                    pod.process.wait(30)
