"""What is said where no API server is reached: no kubeconfig, nobody there, or somebody else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ppod_deploy.k8s import cluster
from support.fake_kubernetes import FakeKubernetes

from .conftest import Command


@pytest.mark.parametrize("text", ["clusters: [", "- a list", "a text", "contexts: [a text]\ncurrent-context: fake"])
def test_a_file_that_is_no_kubeconfig_is_named(
    k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    result = k8s("status", "--once")
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith("ppod: no cluster is configured: ")


@pytest.mark.parametrize("command", [("status", "--once"), ("scale", "reward", "2")])
@pytest.mark.parametrize("answer", ["<html>Log in</html>", "[]", '{"kind": "PodList", "items": null}'])
def test_what_is_no_api_server_is_named(
    k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, command: tuple[str, ...]
) -> None:
    """As a proxy on the way that asks to log in."""
    with answering(answer) as url:
        monkeypatch.setenv("KUBECONFIG", str(FakeKubernetes(url=url).kubeconfig(tmp_path / "proxy")))
        result = k8s(*command)
    assert result.code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ppod: cannot ")
    assert f": {url} answers as no API server does: " in last


@contextmanager
def answering(text: str) -> Generator[str]:
    """Answer every request with 200 and this text; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PATCH = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Write nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_cluster_that_says_nothing_is_not_waited_for_for_ever(
    k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a load balancer that has no API server: the connection is taken, and no word comes."""
    monkeypatch.setattr(cluster, "_TIMEOUT_S", (5.0, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("KUBECONFIG", str(FakeKubernetes(url=url).kubeconfig(tmp_path / "silent")))
        result = k8s("status", "--once")
    assert result.code == 1
    assert f"ppod: the cluster at {url} does not answer: " in result.stderr.splitlines()[-1]
    assert "Read timed out" in result.stderr.splitlines()[-1]


def test_a_cluster_that_does_not_answer_is_named(k8s: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = FakeKubernetes(url="http://127.0.0.1:1")
    monkeypatch.setenv("KUBECONFIG", str(dead.kubeconfig(tmp_path / "dead")))
    result = k8s("scale", "reward", "2")
    assert result.code == 1
    assert "ppod: the cluster at http://127.0.0.1:1 does not answer: " in result.stderr.splitlines()[-1]
