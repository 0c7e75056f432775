"""An API server over real HTTP: collections of objects with lists, watches, patches, logs and refusals.

It keeps what it is given, and no controller runs: a test plays them. Every request is recorded.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from support.kubernetes_paths import KINDS, Object, Place, discovery, matches, merged, place_of


@dataclass(frozen=True)
class Request:
    """What came in."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    content_type: str


@dataclass
class _Event:
    version: int
    kind: str
    place: Place
    object: Object


@dataclass
class FakeKubernetes:
    """The state; `serving` puts it on a port. Tests call `put` and `delete` as a controller would."""

    bookmark_s: float = 0.5
    objects: dict[Place, Object] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    log_ended: set[str] = field(default_factory=set)
    log_cuts: dict[str, int] = field(default_factory=dict)
    """Pods whose log's connection breaks once, before a line of this number."""
    log_rotated: dict[str, int] = field(default_factory=dict)
    """Pods whose log has lost so many of its first lines when it is asked for anew."""
    metrics: dict[str, str] = field(default_factory=dict)
    """What `POD:PORT`s answer through the API server."""
    requests: list[Request] = field(default_factory=list)
    forbidden: set[str] = field(default_factory=set)
    """Parts of `METHOD path`s that are answered 403."""
    no_namespaces: set[str] = field(default_factory=set)
    """Namespaces that there are not."""
    answer: str | None = None
    """What every request is answered with 200, in place of what was asked for."""
    unavailable: bool = False
    controllers: list[Callable[[Request, Place, Object], None]] = field(default_factory=list)
    """Called after each write over HTTP."""
    url: str = ""

    def __post_init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 100
        self.oldest = 0
        self.events: list[_Event] = []
        self.epoch = 0

    def put(self, group: str, plural: str, namespace: str, value: Object) -> Object:
        """Create or replace an object."""
        with self.changed:
            place = Place(group, plural, namespace, value["metadata"]["name"], "")
            kind = "MODIFIED" if place in self.objects else "ADDED"
            self.version += 1
            stored = copy.deepcopy(value)
            stored.setdefault("apiVersion", group)
            stored.setdefault("kind", KINDS[group][plural][0])
            metadata = stored["metadata"]
            metadata["resourceVersion"] = str(self.version)
            metadata.setdefault("uid", f"uid-{place.name}-{self.version}")
            if namespace:
                metadata["namespace"] = namespace
            self.objects[place] = stored
            self.events.append(_Event(self.version, kind, place, copy.deepcopy(stored)))
            self.changed.notify_all()
            return stored

    def delete(self, group: str, plural: str, namespace: str, name: str) -> None:
        with self.changed:
            place = Place(group, plural, namespace, name, "")
            gone = self.objects.pop(place)
            self.version += 1
            gone["metadata"]["resourceVersion"] = str(self.version)
            self.events.append(_Event(self.version, "DELETED", place, gone))
            self.changed.notify_all()

    def get(self, group: str, plural: str, namespace: str, name: str) -> Object:
        with self.changed:
            return copy.deepcopy(self.objects[Place(group, plural, namespace, name, "")])

    def forget_history(self) -> None:
        """End all watches; whoever goes on from a version that was seen so far is answered 410."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self.epoch += 1
            self.changed.notify_all()

    def cut_watches(self) -> None:
        """End all watches in the middle of a chunk, as a connection that breaks does."""
        with self.changed:
            self.epoch += 1
            self.changed.notify_all()

    def log(self, pod: str, *lines: str, ended: bool = False) -> None:
        """Let a pod write lines."""
        with self.changed:
            self.logs.setdefault(pod, []).extend(lines)
            if ended:
                self.log_ended.add(pod)
            self.changed.notify_all()

    def seen(self, method: str, part: str) -> list[Request]:
        """The requests of a method whose path holds this."""
        with self.changed:
            return [one for one in self.requests if one.method == method and part in one.path]

    @contextmanager
    def serving(self, host: str = "127.0.0.1") -> Iterator[FakeKubernetes]:
        """Listen on a free port."""
        handler = cast("type[BaseHTTPRequestHandler]", type("Bound", (_Handler,), {"state": self}))
        server = ThreadingHTTPServer((host, 0), handler)
        server.daemon_threads = True
        self.url = f"http://{host}:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.cut_watches()
            server.shutdown()
            server.server_close()
            thread.join()

    def kubeconfig(self, path: Path, namespace: str = "ppod") -> Path:
        """A kubeconfig that leads here."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {"token": "secret-token"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": namespace}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeKubernetes

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write nothing: the requests are recorded."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        split = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        body = yaml.safe_load(raw) if raw else None
        request = Request(self.command, unquote(split.path), query, body, self.headers.get("Content-Type", ""))
        with self.state.changed:
            self.state.requests.append(request)
        try:
            self._route(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, request: Request) -> None:
        state = self.state
        if state.unavailable:
            return self._status(503, "ServiceUnavailable", "down")
        if state.answer is not None:
            return self._text(state.answer)
        if any(part in f"{request.method} {request.path}" for part in state.forbidden):
            return self._status(403, "Forbidden", f"{request.method} {request.path} is forbidden")
        if (document := discovery(request.path)) is not None:
            return self._json(200, document)
        place = place_of(request.path)
        if place is None or place.plural not in KINDS.get(place.group, {}):
            return self._status(404, "NotFound", f"no such path: {request.path}")
        if place.subresource == "proxy":
            return self._proxy(place)
        if request.method == "GET":
            if place.subresource == "log":
                return self._log(place, request)
            if not place.name:
                return (
                    self._watch(place, request) if request.query.get("watch") == "true" else self._list(place, request)
                )
        return self._object(place, request)

    def _list(self, place: Place, request: Request) -> None:
        state = self.state
        with state.changed:
            items = [copy.deepcopy(one) for at, one in state.objects.items() if matches(at, one, place, request.query)]
            version = str(state.version)
        kind = KINDS[place.group][place.plural][0]
        body = {
            "kind": f"{kind}List",
            "apiVersion": place.group,
            "metadata": {"resourceVersion": version},
            "items": items,
        }
        self._json(200, body)

    def _watch(self, place: Place, request: Request) -> None:
        state = self.state
        seen = int(request.query.get("resourceVersion") or 0)
        with state.changed:
            epoch = state.epoch
            if seen < state.oldest:
                return self._status(410, "Expired", f"too old resource version: {seen} ({state.oldest})")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        until = time.monotonic() + float(request.query.get("timeoutSeconds") or 300)
        bookmarks = request.query.get("allowWatchBookmarks") == "true"
        while time.monotonic() < until:
            with state.changed:
                new = [one for one in state.events if one.version > seen]
                if not new and epoch == state.epoch:
                    state.changed.wait(state.bookmark_s)
                    new = [one for one in state.events if one.version > seen]
                ended, version = epoch != state.epoch, state.version
            for one in new:
                seen = one.version
                if matches(one.place, one.object, place, request.query):
                    self._chunk({"type": one.kind, "object": one.object})
            if ended:
                self.wfile.write(b'40\r\n{"type":')
                self.wfile.flush()
                self.close_connection = True
                return None
            if not new and bookmarks:
                seen = version
                kind = KINDS[place.group][place.plural][0]
                metadata = {"resourceVersion": str(version)}
                self._chunk({"type": "BOOKMARK", "object": {"kind": kind, "metadata": metadata}})
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _object(self, place: Place, request: Request) -> None:
        state = self.state
        with state.changed:
            at = Place(place.group, place.plural, place.namespace, place.name, "")
            if place.namespace in state.no_namespaces:
                return self._status(404, "NotFound", f'namespaces "{place.namespace}" not found')
            if request.method == "POST":
                name = request.body["metadata"]["name"]
                at = Place(place.group, place.plural, place.namespace, name, "")
                if at in state.objects:
                    return self._status(409, "AlreadyExists", f'{place.plural} "{name}" already exists')
                stored = state.put(place.group, place.plural, place.namespace, request.body)
            elif at not in state.objects and not (request.method == "PATCH" and "apply-patch" in request.content_type):
                return self._status(404, "NotFound", f'{place.plural} "{place.name}" not found')
            elif request.method == "PATCH":
                old = copy.deepcopy(state.objects.get(at, {}))
                stored = state.put(place.group, place.plural, place.namespace, merged(old, request.body))
            elif request.method == "PUT":
                stored = state.put(place.group, place.plural, place.namespace, request.body)
            elif request.method == "DELETE":
                stored = state.objects[at]
                state.delete(place.group, place.plural, place.namespace, place.name)
            else:
                stored = state.objects[at]
            if request.method != "GET":
                for controller in state.controllers:
                    controller(request, at, stored)
            answer = copy.deepcopy(state.objects.get(at, stored))
        if place.subresource == "scale":
            answer = {
                "kind": "Scale",
                "apiVersion": "autoscaling/v1",
                "metadata": answer["metadata"],
                "spec": {"replicas": answer["spec"]["replicas"]},
                "status": {"replicas": answer.get("status", {}).get("replicas", 0)},
            }
        return self._json(200, answer)

    def _log(self, place: Place, request: Request) -> None:
        state = self.state
        with state.changed:
            asked_before = len([one for one in state.requests if one.path == request.path]) > 1
            sent = state.log_rotated.get(place.name, 0) if asked_before else 0
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            with state.changed:
                lines = state.logs.get(place.name, [])
                if len(lines) == sent and request.query.get("follow") == "true" and place.name not in state.log_ended:
                    state.changed.wait(0.1)
                new, sent = lines[sent:], len(lines)
                ended = place.name in state.log_ended or request.query.get("follow") != "true"
            for number, line in enumerate(new, start=sent - len(new) + 1):
                if state.log_cuts.get(place.name) == number:
                    del state.log_cuts[place.name]
                    self.close_connection = True
                    return
                stamp = f"2026-01-01T00:00:00.{number:09d}Z " if request.query.get("timestamps") == "true" else ""
                data = f"{stamp}{line}\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
            if ended:
                break
        self.wfile.write(b"0\r\n\r\n")

    def _proxy(self, place: Place) -> None:
        text = self.state.metrics.get(place.name)
        if text is None:
            return self._status(503, "ServiceUnavailable", f"error trying to reach service: {place.name}")
        return self._text(text)

    def _text(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _chunk(self, event: Object) -> None:
        data = json.dumps(event).encode() + b"\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _status(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self._json(code, {**status, "message": message})

    def _json(self, code: int, body: Object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
