"""Who tells a client which replicas there are, where that changes while it lives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from ppod.client.endpoint_slices import Endpoint
from ppod.client.kubernetes_target import KubernetesTarget
from ppod.client.replicas import Replicas
from ppod.client.service_watch import ServiceWatch, close_service_watch, open_service_watch
from ppod.errors import InvalidArgument


class ReplicaSource(Protocol):
    """Keeps a client's replicas current."""

    @property
    def server_name(self) -> str:
        """The name that all replicas' certificates carry."""
        ...

    def attach(self, replicas: Replicas) -> None:
        """Replace these replicas now and at every change, from whatever thread."""
        ...

    def detach(self, replicas: Replicas) -> None:
        """Leave them alone."""
        ...

    def wait_for_one(self, timeout_s: float) -> None:
        """Return when there is a replica; raise the PpodError that says why there is none."""
        ...


class KubernetesReplicas:
    """The ready pods of a Service, for one client.

    Raises:
        InvalidArgument: the package `kubernetes` is not installed, or there is no cluster to ask.
    """

    def __init__(self, target: KubernetesTarget) -> None:
        self._port = target.port
        self._watch: ServiceWatch = open_service_watch(target.service, target.namespace)
        self._lock = threading.Lock()
        self._replicas: Replicas | None = None

    @property
    def server_name(self) -> str:
        """See `ReplicaSource`."""
        return f"{self._watch.service}.{self._watch.namespace}.svc"

    def attach(self, replicas: Replicas) -> None:
        """See `ReplicaSource`; once."""
        self._replicas = replicas
        self._watch.listen(self._told)

    def detach(self, replicas: Replicas) -> None:
        """See `ReplicaSource`."""
        with self._lock:
            if self._replicas is not replicas:
                return
            self._replicas = None
        self._watch.unlisten(self._told)
        close_service_watch(self._watch)

    def wait_for_one(self, timeout_s: float) -> None:
        """See `ReplicaSource`.

        Raises:
            InvalidArgument: the pods have no port of this name. Others as `ServiceWatch.wait_for`.
        """
        self._watch.wait_for(lambda endpoints: any(one.ready for one in endpoints), timeout_s)
        endpoints = self._watch.endpoints
        if endpoints and not any(one.address(self._port) for one in endpoints):
            names = sorted({name for one in endpoints for name in one.ports})
            raise InvalidArgument("target", f"port {self._port!r} of Service {self._watch.service}", " or ".join(names))

    def _told(self, endpoints: Sequence[Endpoint]) -> None:
        replicas = self._replicas
        if replicas is not None:
            addresses = (one.address(self._port) for one in endpoints if one.ready)
            replicas.replace(list(dict.fromkeys(address for address in addresses if address)))
