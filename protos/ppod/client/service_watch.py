"""Follows the pods behind Services: one list and one watch for each Service, however many clients a process has."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence

from ppod.client.endpoint_slices import Endpoint, SliceTable
from ppod.client.kubernetes_api import (
    Cluster,
    EndpointSliceApi,
    EventStream,
    GoneError,
    change_of,
    load_cluster,
    version_of,
)
from ppod.errors import PermissionDenied, PpodError, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

Listener = Callable[[Sequence[Endpoint]], None]
"""Told of all pods of a Service, from the watching thread, whenever one of them changes."""

_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 5.0
_STOP_S = 2.0
_SHORT_S = 1.0
"""A watch that is shorter, and tells nothing, was not worth its opening."""


class ServiceWatch:
    """What one thread knows of one Service. While the API is away, what was known last stands.

    Args:
        cluster: where.
        namespace, service: which.
    """

    def __init__(self, cluster: Cluster, namespace: str, service: str) -> None:
        self.namespace = namespace
        self.service = service
        self._api = EndpointSliceApi(cluster, namespace, service)
        self._table = SliceTable()
        self._changed = threading.Condition()
        self._endpoints: tuple[Endpoint, ...] | None = None
        self._error: PpodError | None = None
        self._warned = False
        self._listeners: list[Listener] = []
        self._stopping = threading.Event()
        self._stream: EventStream | None = None
        self._seen = ""
        self._thread = threading.Thread(target=self._run, name=f"endpoints-{service}", daemon=True)
        self._thread.start()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All pods now, those included that drain or start; none before the first list."""
        with self._changed:
            return self._endpoints or ()

    def listen(self, listener: Listener) -> None:
        """Tell a listener of all pods: now, where they are known, and at every change."""
        with self._changed:
            self._listeners.append(listener)
            if self._endpoints is not None:
                listener(self._endpoints)

    def unlisten(self, listener: Listener) -> None:
        """Tell it nothing more."""
        with self._changed:
            self._listeners.remove(listener)

    def wait_for(self, enough: Callable[[Sequence[Endpoint]], bool], timeout_s: float) -> None:
        """Return when the pods are enough.

        Raises:
            PermissionDenied, Unauthenticated: the API does not let this process list them.
            Unavailable: they are not enough in time, or the API does not answer.
        """

        def settled() -> bool:
            refused = self._endpoints is None and isinstance(self._error, PermissionDenied | Unauthenticated)
            return refused or self._stopping.is_set() or (self._endpoints is not None and enough(self._endpoints))

        with self._changed:
            if self._changed.wait_for(settled, timeout_s) and self._endpoints is not None:
                return
            if self._endpoints is None:
                raise self._error or Unavailable(f"the Kubernetes API told nothing of {self.service} in time")
            raise Unavailable(
                f"Service {self.service} in namespace {self.namespace} has no ready pod; "
                f"{len(self._endpoints)} are not ready"
            )

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        with self._changed:
            if self._stream is not None:
                self._stream.stop()
            self._changed.notify_all()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                if not self._seen:
                    self._list()
                begun = time.monotonic()
                told = self._watch()
                if told or time.monotonic() - begun > _SHORT_S:
                    failures = 0
                else:
                    # As of a server that is shutting down, which would be asked a thousand times a second.
                    failures += 1
                    self._pause(failures)
            except GoneError:
                self._seen = ""
                # Straight to a new list, unless the server says so time and again.
                failures += 1
                if failures > 1:
                    self._pause(failures)
            except PpodError as error:
                # What is missed meanwhile is told later, from the last version that was seen.
                failures += 1
                self._failed(error, failures)
        self._api.close()

    def _list(self) -> None:
        found = self._api.list()
        self._table.replace(found["items"])
        self._seen = found["metadata"]["resourceVersion"]
        self._publish()

    def _watch(self) -> bool:
        """Follow changes from the last version that was seen, until the server ends it; returns whether it told any."""
        told = False
        with self._api.watch(self._seen) as stream:
            with self._changed:
                self._stream = stream
                self._answered()
            try:
                for event in stream if not self._stopping.is_set() else ():
                    told = True
                    change = change_of(event)
                    self._seen = version_of(event) or self._seen
                    if change is not None:
                        self._table.apply(*change)
                        self._publish()
            finally:
                with self._changed:
                    self._stream = None
        return told

    def _publish(self) -> None:
        endpoints = self._table.endpoints()
        with self._changed:
            self._answered()
            if endpoints != self._endpoints:
                self._endpoints = endpoints
                for listener in self._listeners:
                    listener(endpoints)
            self._changed.notify_all()

    def _answered(self) -> None:
        if self._warned:
            log.info("the Kubernetes API tells of %s again", self.service)
        self._error, self._warned = None, False

    def _failed(self, error: PpodError, failures: int) -> None:
        if self._stopping.is_set():
            return
        with self._changed:
            # A watch that breaks once, as behind a proxy, is nothing to worry about.
            if failures > 1 and not self._warned:
                self._warned = True
                log.warning("%s in namespace %s is not watched: %s", self.service, self.namespace, error)
            self._error = error
            self._changed.notify_all()
        self._pause(failures)

    def _pause(self, failures: int) -> None:
        longest = min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 10))
        self._stopping.wait(random.uniform(longest / 2, longest))


class _SharedWatches:
    """The watches of this process. A watch ends with its last user."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[tuple[str, str, str], tuple[ServiceWatch, int]] = {}

    def open(self, service: str, namespace: str | None) -> ServiceWatch:
        """The watch of a Service; give it back with `close`. Raises InvalidArgument: there is no cluster."""
        cluster = load_cluster()
        where = namespace or cluster.namespace
        key = os.environ.get("KUBECONFIG", ""), where, service
        with self._lock:
            watch, users = self._watches.get(key) or (ServiceWatch(cluster, where, service), 0)
            self._watches[key] = watch, users + 1
            return watch

    def close(self, watch: ServiceWatch) -> None:
        """One user less."""
        with self._lock:
            [key] = [key for key, (each, _) in self._watches.items() if each is watch]
            users = self._watches[key][1] - 1
            if users:
                self._watches[key] = watch, users
                return
            del self._watches[key]
        watch.stop()


_SHARED = _SharedWatches()
open_service_watch = _SHARED.open
close_service_watch = _SHARED.close
