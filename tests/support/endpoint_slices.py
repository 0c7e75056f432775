"""EndpointSlices as the control plane writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from support.fake_kubernetes import FakeKubernetes, Object

GROUP = "discovery.k8s.io/v1"


@dataclass(frozen=True)
class Pod:
    """One pod as its slice tells of it."""

    name: str
    host: str
    ready: bool = True
    serving: bool = True
    terminating: bool = False


def slice_of(
    service: str, pods: Sequence[Pod], ports: Mapping[str, int], *, name: str = "", family: str = "IPv4"
) -> Object:
    return {
        "metadata": {"name": name or f"{service}-1", "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": [
            {
                "addresses": [pod.host],
                "conditions": {"ready": pod.ready, "serving": pod.serving, "terminating": pod.terminating},
                "targetRef": {"kind": "Pod", "name": pod.name, "uid": f"uid-{pod.name}"},
            }
            for pod in pods
        ],
        "ports": [{"name": port, "port": number, "protocol": "TCP"} for port, number in ports.items()],
    }


class EndpointController:
    """Writes the slice of one Service as pods come, change and go."""

    def __init__(self, api: FakeKubernetes, service: str, ports: Mapping[str, int], namespace: str = "ppod") -> None:
        self._api, self._service, self._ports, self._namespace = api, service, ports, namespace
        self._pods: dict[str, Pod] = {}
        self._write()

    def ready(self, name: str, host: str) -> None:
        """A pod is ready."""
        self._pods[name] = Pod(name, host)
        self._write()

    def not_ready(self, name: str) -> None:
        """A pod's readiness probe fails."""
        self._pods[name] = replace(self._pods[name], ready=False, serving=False)
        self._write()

    def terminating(self, name: str) -> None:
        """A pod is being deleted, and drains."""
        self._pods[name] = replace(self._pods[name], ready=False, terminating=True)
        self._write()

    def gone(self, name: str) -> None:
        """A pod is deleted."""
        del self._pods[name]
        self._write()

    def unavailable(self, away: bool) -> None:
        """Let the API server go away, with all watches, or come back."""
        self._api.unavailable = away
        self._api.cut_watches()

    def _write(self) -> None:
        self._api.put(
            GROUP, "endpointslices", self._namespace, slice_of(self._service, list(self._pods.values()), self._ports)
        )
