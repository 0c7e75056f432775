"""EndpointSlices by the package `kubernetes`: the only place that knows it, imported when a `k8s:` target is used."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, cast

from ppod.client.endpoint_slices import Change, MetadataObject, SliceObject
from ppod.errors import InvalidArgument, PermissionDenied, PpodError, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, Configuration

_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CONNECT_TIMEOUT_S = 5.0
_LIST_TIMEOUT_S = 15.0
WATCH_S = 120
"""The server ends a watch after this long; it is then opened anew where it ended."""
_WATCH_SILENCE_S = 150.0
_GONE = 410


class GoneError(Exception):
    """The history that a watch asked for is no longer kept: list anew."""


class StatusObject(TypedDict, total=False):
    """A Status of the API, which a watch sends as its ERROR event."""

    code: int
    message: str


class _ListMetadata(TypedDict):
    resourceVersion: str


class SliceList(TypedDict):
    """What is used of an EndpointSliceList."""

    metadata: _ListMetadata
    items: list[SliceObject]


class WatchEvent(TypedDict):
    """One line of a watch. A BOOKMARK carries a resource version alone."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: SliceObject


class _Response(Protocol):
    """What is used of urllib3's response."""

    data: bytes

    def stream(self, amt: int | None = None) -> Iterator[bytes]: ...
    def shutdown(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Cluster:
    """How an API server is reached.

    Attributes:
        configuration: for clients of the package.
        namespace: this process's, or the current context's.
    """

    configuration: Configuration
    namespace: str


def load_cluster() -> Cluster:
    """KUBECONFIG where it is set; else this pod's service account; else ~/.kube/config.

    Raises:
        InvalidArgument: the package is not installed, or there is no such configuration.
    """
    try:
        from kubernetes import config  # noqa: PLC0415
        from kubernetes.client import Configuration  # noqa: PLC0415
        from kubernetes.utils import tcp_keepalive_socket_options  # noqa: PLC0415
        from yaml import YAMLError  # noqa: PLC0415
    except ImportError as error:
        raise InvalidArgument(
            "target", "a k8s: target without the package kubernetes", "pip install 'ppod[kubernetes]', or a dns: target"
        ) from error
    configuration = Configuration()
    try:
        if not os.environ.get("KUBECONFIG") and os.environ.get(_IN_CLUSTER):
            config.load_incluster_config(client_configuration=configuration)
            namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        else:
            path = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
            _, current = config.list_kube_config_contexts(path)
            config.load_kube_config(path, client_configuration=configuration, persist_config=False)
            namespace = cast("str", current["context"].get("namespace") or "default")
    # The package looks into what it has read as if it were a kubeconfig, whatever it is.
    except (config.ConfigException, OSError, YAMLError, TypeError, ValueError) as error:
        found = " ".join(str(error).split())
        raise InvalidArgument(
            "target", f"a k8s: target without a cluster: {found}", "a pod's service account, or a kubeconfig"
        ) from error
    # A connection whose other end vanished without a word is noticed after 11 s, not never.
    configuration.socket_options = [
        *tcp_keepalive_socket_options(idle=5, interval=2, count=3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 11_000),
    ]
    configuration.retries = 0
    return Cluster(configuration, namespace)


class EndpointSliceApi:
    """The slices of one Service."""

    def __init__(self, cluster: Cluster, namespace: str, service: str) -> None:
        from kubernetes.client import ApiClient, DiscoveryV1Api  # noqa: PLC0415

        self._client: ApiClient = ApiClient(cluster.configuration)
        self._api = DiscoveryV1Api(self._client)
        self._host = cluster.configuration.host
        self._namespace = namespace
        self._selector = f"kubernetes.io/service-name={service}"

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def list(self) -> SliceList:
        """All slices now.

        Raises:
            PermissionDenied, Unauthenticated, Unavailable: why not.
        """
        with self._typed():
            response = cast(
                "_Response",
                self._api.list_namespaced_endpoint_slice(
                    self._namespace,
                    label_selector=self._selector,
                    _preload_content=False,
                    _request_timeout=(_CONNECT_TIMEOUT_S, _LIST_TIMEOUT_S),
                ),
            )
            return _list_of(json.loads(response.data))

    @contextmanager
    def watch(self, resource_version: str) -> Generator[EventStream]:
        """Changes since a version.

        Raises:
            GoneError: the version is too old. Others as `list`.
        """
        with self._typed():
            response = cast(
                "_Response",
                self._api.list_namespaced_endpoint_slice(
                    self._namespace,
                    label_selector=self._selector,
                    resource_version=resource_version,
                    allow_watch_bookmarks=True,
                    timeout_seconds=WATCH_S,
                    watch=True,
                    _preload_content=False,
                    _request_timeout=(_CONNECT_TIMEOUT_S, _WATCH_SILENCE_S),
                ),
            )
            try:
                yield EventStream(response)
            finally:
                response.close()

    @contextmanager
    def _typed(self) -> Generator[None]:
        """Turn what the package and its transport raise into errors of ours."""
        from kubernetes.client import ApiException  # noqa: PLC0415
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        try:
            yield
        except ApiException as error:
            raise self._refusal(cast("int", error.status or 0), str(error.reason)) from error
        except (HTTPError, OSError, ValueError) as error:
            raise Unavailable(f"the Kubernetes API at {self._host} does not answer: {error}") from error

    def _refusal(self, code: int, reason: str) -> PpodError | GoneError:
        if code == _GONE:
            return GoneError(reason)
        if code == 401:
            return Unauthenticated(f"the Kubernetes API at {self._host} does not know this caller: {reason}")
        if code == 403:
            return PermissionDenied(
                f"the Kubernetes API at {self._host} lets this caller not watch endpointslices in namespace "
                f"{self._namespace}: allow get, list and watch of endpointslices (discovery.k8s.io) there, or use "
                "dns:///HEADLESS-SERVICE:PORT, which needs no permission"
            )
        return Unavailable(f"the Kubernetes API at {self._host} answers {code} {reason}")


class EventStream:
    """The events of one watch. `stop` may be called from another thread."""

    def __init__(self, response: _Response) -> None:
        self._response = response

    def stop(self) -> None:
        """Wake whoever reads: the stream ends."""
        # It may have ended by itself in this moment.
        with suppress(OSError, ValueError):
            self._response.shutdown()

    def __iter__(self) -> Iterator[WatchEvent]:
        rest = b""
        for chunk in self._response.stream():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (_event_of(json.loads(line)) for line in lines if line.strip())


def _list_of(answer: object) -> SliceList:
    """Raises ValueError: it is another's answer than an API server's, as of a proxy on the way."""
    given = _mapping(answer)
    if not isinstance(given.get("items"), list) or not isinstance(
        _mapping(given.get("metadata")).get("resourceVersion"), str
    ):
        raise ValueError(f"expected a list of EndpointSlices, found {str(answer)[:100]}")
    return cast("SliceList", answer)


def _event_of(line: object) -> WatchEvent:
    """Raises ValueError: as `_list_of`."""
    given = _mapping(line)
    if not isinstance(given.get("type"), str) or not isinstance(given.get("object"), dict):
        raise ValueError(f"expected an event of a watch, found {str(line)[:100]}")
    return cast("WatchEvent", line)


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else {}


def change_of(event: WatchEvent) -> tuple[Change, SliceObject] | None:
    """What an event changes; None for a bookmark.

    Raises:
        GoneError, Unavailable: the server ends the watch with an error.
    """
    match event["type"]:
        case "ADDED" | "MODIFIED" | "DELETED" as change:
            return change, event["object"]
        case "BOOKMARK":
            return None
        case "ERROR":
            status = cast("StatusObject", event["object"])
            if status.get("code") == _GONE:
                raise GoneError(status.get("message", ""))
            raise Unavailable(f"the Kubernetes API ended a watch: {status.get('code')} {status.get('message')}")


def version_of(event: WatchEvent) -> str:
    """The resource version to go on from after an event."""
    metadata: MetadataObject = event["object"].get("metadata", {})
    return metadata.get("resourceVersion", "")
