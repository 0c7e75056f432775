"""The cluster's API by the package `kubernetes`, which is untyped: the only place of `ppod k8s` that knows it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import ResourceNotFoundError
from urllib3.exceptions import HTTPError
from yaml import YAMLError

from ppod_deploy.k8s.kubectl import FIELD_MANAGER
from ppod_deploy.k8s.objects import Identity, K8sError, Manifest, identity_of

_TIMEOUT_S = (5.0, 30.0)


class _Client(DynamicClient):
    """Bounds what the package asks by itself, to discover kinds: for that it would wait for ever."""

    def request(self, method: str, path: str, body: object = None, **params: Any) -> Any:
        """See DynamicClient."""
        return super().request(method, path, body, **{"_request_timeout": _TIMEOUT_S, **params})


class _Stream(Protocol):
    def stream(self, amt: int | None = None) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Cluster:
    """One cluster and one namespace.

    Raises:
        K8sError: there is no configuration, or no cluster answers.
    """

    def __init__(self, namespace: str, context: str | None) -> None:
        self.namespace = namespace
        configuration = client.Configuration()
        try:
            if context is None and not os.environ.get("KUBECONFIG") and os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_incluster_config(client_configuration=configuration)
            else:
                path = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
                config.load_kube_config(path, context, client_configuration=configuration, persist_config=False)
        # The package looks into what it has read as if it were a kubeconfig, whatever it is.
        except (config.ConfigException, OSError, YAMLError, AttributeError, TypeError, ValueError) as error:
            found = " ".join(str(error).split())
            raise K8sError(
                f"no cluster is configured: {found}; set KUBECONFIG, name a --context, or run inside a pod"
            ) from error
        configuration.retries = 1
        # A log may be silent for longer than a load balancer on the way keeps a connection, and drops it unsaid.
        configuration.keep_alive = True
        self._host = configuration.host
        self._api = client.ApiClient(configuration)
        self._core = client.CoreV1Api(self._api)
        self._found: Any = None
        # What the package finds out about the cluster goes into a file: not into one that others can foresee.
        self._directory = tempfile.TemporaryDirectory(prefix="ppod-k8s-")

    def close(self) -> None:
        """Close all connections."""
        self._api.close()
        self._directory.cleanup()

    def apply(self, manifest: Manifest) -> Manifest:
        """Create an object, or set what the manifest says of it, by server-side apply; returns it as it is then."""
        identity = self._placed(identity_of(manifest))
        try:
            with self._typed("patch", identity):
                applied = self._resource(identity).server_side_apply(
                    body=dict(manifest),
                    name=identity.name,
                    namespace=identity.namespace or None,
                    field_manager=FIELD_MANAGER,
                    force_conflicts=True,
                    _request_timeout=_TIMEOUT_S,
                )
                return cast("Manifest", applied.to_dict())
        except _NotFound as error:
            # What is missing is another object than this one, as its namespace.
            raise K8sError(f"cannot patch {identity}: {error.said}") from error

    def delete(self, identity: Identity) -> bool:
        """Delete an object and what it owns; False where there was none: of its name, or of its kind."""
        try:
            placed = self._placed(identity)
        except _UnknownKind:
            return False
        try:
            with self._typed("delete", placed):
                self._resource(placed).delete(
                    name=placed.name,
                    namespace=placed.namespace or None,
                    body={"propagationPolicy": "Background"},
                    _request_timeout=_TIMEOUT_S,
                )
        except _NotFound:
            return False
        return True

    def get(self, identity: Identity) -> Manifest | None:
        """An object as it is now; None where there is none."""
        placed = self._placed(identity)
        try:
            with self._typed("get", placed):
                found = self._resource(placed).get(
                    name=placed.name, namespace=placed.namespace or None, _request_timeout=_TIMEOUT_S
                )
                return cast("Manifest", found.to_dict())
        except _NotFound:
            return None

    def list(self, api_version: str, kind: str, labels: str = "") -> list[Manifest]:
        """All objects of a kind in the namespace that have these labels (`a=b,c=d`)."""
        identity = Identity(api_version, kind, self.namespace, "")
        with self._typed("list", identity):
            found = self._resource(identity).get(
                namespace=self.namespace, label_selector=labels or None, _request_timeout=_TIMEOUT_S
            )
            return [cast("Manifest", item) for item in cast("dict[str, Any]", found.to_dict())["items"]]

    def scale(self, deployment: str, replicas: int) -> None:
        """Set a Deployment's number of replicas."""
        identity = Identity("apps/v1", "Deployment", self.namespace, deployment)
        with self._typed("patch the scale of", identity):
            client.AppsV1Api(self._api).patch_namespaced_deployment_scale(
                deployment, self.namespace, {"spec": {"replicas": replicas}}, _request_timeout=_TIMEOUT_S
            )

    def metrics(self, pod: str, port: int) -> str:
        """What a pod's /metrics says, through the API server."""
        identity = Identity("v1", "Pod", self.namespace, f"{pod}:{port}")
        with self._typed("proxy to", identity):
            found = self._core.connect_get_namespaced_pod_proxy_with_path(
                f"{pod}:{port}", self.namespace, "metrics", _preload_content=False, _request_timeout=(2.0, 5.0)
            )
            return cast("bytes", cast("Any", found).data).decode()

    def log(self, pod: str, *, follow: bool, tail: int | None, timestamps: bool = False) -> Iterator[str]:
        """The lines of a pod's log; with `follow` until its container ends, with `timestamps` each behind its own."""
        identity = Identity("v1", "Pod", self.namespace, pod)
        with self._typed("read the log of", identity):
            stream = cast(
                "_Stream",
                self._core.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    follow=follow,
                    tail_lines=tail,
                    timestamps=timestamps,
                    _preload_content=False,
                    # A log that is followed may be silent for as long as it likes.
                    _request_timeout=None if follow else _TIMEOUT_S,
                ),
            )
            try:
                rest = b""
                for chunk in stream.stream():
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from (line.decode(errors="replace") for line in lines)
                if rest:
                    yield rest.decode(errors="replace")
            finally:
                stream.close()

    def _placed(self, identity: Identity) -> Identity:
        """With the namespace that it is in: its own, this one's, or none for a kind that has none."""
        namespaced = bool(self._resource(identity).namespaced)
        namespace = (identity.namespace or self.namespace) if namespaced else ""
        return Identity(identity.api_version, identity.kind, namespace, identity.name)

    def _resource(self, identity: Identity) -> Any:
        try:
            with self._typed("discover", identity):
                if self._found is None:
                    self._found = _Client(self._api, cache_file=str(Path(self._directory.name) / "resources.json"))
                return self._found.resources.get(api_version=identity.api_version, kind=identity.kind)
        except ResourceNotFoundError as error:
            raise _UnknownKind(
                f"the cluster knows no {identity.kind} of {identity.api_version}: install what defines it, or use an "
                "overlay without it"
            ) from error

    @contextmanager
    def _typed(self, verb: str, identity: Identity) -> Generator[None]:
        """One line for whatever went wrong."""
        where = f" in namespace {identity.namespace}" if identity.namespace else ""
        try:
            yield
        except client.ApiException as error:
            code, message = cast("int", error.status or 0), _message(error)
            if code == 404:
                raise _NotFound(f"there is no {identity}{where}", message) from error
            if code in {401, 403}:
                raise K8sError(f"the cluster does not let you {verb} {identity}{where} ({code}): {message}") from error
            raise K8sError(f"cannot {verb} {identity}{where}: {code} {message}") from error
        except (HTTPError, OSError) as error:
            raise K8sError(f"the cluster at {self._host} does not answer: {error}") from error
        # The package looks into answers, too, as if they were an API server's.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found = " ".join(str(error).split())
            raise K8sError(
                f"cannot {verb} {identity}{where}: {self._host} answers as no API server does: {found}"
            ) from error


class _NotFound(K8sError):
    """There is no such object; `said` is how the API server puts it."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class _UnknownKind(K8sError):
    """The cluster knows no such kind of objects."""


def _message(error: client.ApiException) -> str:
    """What the API server says, without the rest of its Status."""
    try:
        status = cast("Mapping[str, object]", json.loads(cast("str | bytes", error.body or "{}")))
    except ValueError:
        return str(error.reason)
    return str(status.get("message") or error.reason)
