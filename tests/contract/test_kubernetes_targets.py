"""`k8s:` targets over real gRPC and real HTTP: what a client does about pods, refusals, and an API that is away."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ppod import InvalidArgument, PermissionDenied, RewardClient, Unauthenticated, Unavailable
from ppod.client import open_service_watch
from ppod.client.service_watch import close_service_watch
from support.endpoint_slices import GROUP, EndpointController, Pod, slice_of
from support.fake_kubernetes import FakeKubernetes
from support.processes import free_ports
from support.scripted_services import Script, ScriptedServer, scripted_server

TARGET = "k8s:///ppod-reward:grpc"
PATH = "/apis/discovery.k8s.io/v1/namespaces/ppod/endpointslices"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    with FakeKubernetes(bookmark_s=0.1).serving() as served:
        monkeypatch.setenv("KUBECONFIG", str(served.kubeconfig(tmp_path / "kubeconfig")))
        yield served


@contextmanager
def servers(count: int) -> Iterator[tuple[int, list[ScriptedServer]]]:
    """Scripted servers at 127.0.0.11 and on, all on one port."""
    [port] = free_ports(1)
    with ExitStack() as stack:
        hosts = [f"127.0.0.{11 + number}" for number in range(count)]
        yield port, [stack.enter_context(scripted_server(Script(), port=port, host=host)) for host in hosts]


def wait_until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def lists(api: FakeKubernetes) -> int:
    return sum(one.query.get("watch") != "true" for one in api.seen("GET", PATH))


def test_one_list_and_one_watch_follow_all_changes(api: FakeKubernetes) -> None:
    with servers(2) as (port, [first, second]):
        pods = EndpointController(api, "ppod-reward", {"grpc": port})
        pods.ready("a", "127.0.0.11")
        with RewardClient(TARGET, timeout_s=10) as client:
            client.score([[1]])
            pods.ready("b", "127.0.0.12")
            wait_until(lambda: client.score([[1]]) is not None and len(second.script.requests) > 0)
            pods.terminating("a")
            time.sleep(0.3)
            before = len(first.script.requests)
            for _ in range(5):
                client.score([[1]])
            assert len(first.script.requests) == before
        watching = [one for one in api.seen("GET", PATH) if one.query.get("watch") == "true"]
        assert (lists(api), len(watching)) == (1, 1)
        assert {one.query["labelSelector"] for one in api.requests} == {"kubernetes.io/service-name=ppod-reward"}
        assert watching[0].query["allowWatchBookmarks"] == "true"
        assert int(watching[0].query["resourceVersion"]) > 0


def test_a_watch_goes_on_from_the_last_bookmark_and_lists_anew_only_when_that_is_gone(api: FakeKubernetes) -> None:
    pods = EndpointController(api, "ppod-reward", {"grpc": 1})
    pods.ready("a", "127.0.0.11")
    watch = open_service_watch("ppod-reward", None)
    try:
        watch.wait_for(lambda endpoints: len(endpoints) == 1, 10)
        # Changes of other objects move the version on; bookmarks tell.
        for number in range(5):
            api.put("v1", "configmaps", "ppod", {"metadata": {"name": f"other-{number}"}})
        seen = api.version
        time.sleep(0.4)
        api.cut_watches()
        wait_until(lambda: len(api.requests) == 3)
        pods.ready("b", "127.0.0.12")
        watch.wait_for(lambda endpoints: len(endpoints) == 2, 5)
        assert lists(api) == 1
        assert int(api.requests[-1].query["resourceVersion"]) == seen
        # As after an API server lost its history: the version that the watch knows is too old.
        with api.changed:
            api.forget_history()
            del api.objects[next(at for at in api.objects if at.group == GROUP)]
        watch.wait_for(lambda endpoints: len(endpoints) == 0, 5)
        assert lists(api) == 2
    finally:
        close_service_watch(watch)


def test_clients_of_one_service_share_a_watch_which_ends_with_the_last(api: FakeKubernetes) -> None:
    with servers(1) as (port, _):
        EndpointController(api, "ppod-reward", {"grpc": port}).ready("a", "127.0.0.11")
        first, second = RewardClient(TARGET), RewardClient(TARGET)
        first.score([[1]])
        second.score([[1]])
        assert lists(api) == 1
        first.close()
        first.close()
        second.score([[1]])
        second.close()
        assert not [each for each in threading.enumerate() if each.name == "endpoints-ppod-reward"]


def test_a_port_by_number_and_a_namespace_of_its_own(api: FakeKubernetes) -> None:
    with servers(1) as (port, [server]):
        api.put(GROUP, "endpointslices", "team-a", slice_of("ppod-reward", [Pod("a", "127.0.0.11")], {"other": 1}))
        with RewardClient(f"k8s:///ppod-reward.team-a:{port}", timeout_s=10) as client:
            client.score([[1]])
        assert len(server.script.requests) == 1
        assert api.requests[0].path == PATH.replace("/ppod/", "/team-a/")


def test_a_port_that_no_pod_has_is_named(api: FakeKubernetes) -> None:
    EndpointController(api, "ppod-reward", {"grpc": 1, "admin": 2}).ready("a", "127.0.0.11")
    with RewardClient("k8s:///ppod-reward:grcp", timeout_s=10) as client, pytest.raises(InvalidArgument) as caught:
        client.score([[1]])
    assert "port 'grcp' of Service ppod-reward, expected admin or grpc" in str(caught.value)


def test_who_may_not_watch_is_told_what_to_allow_and_what_else_there_is(api: FakeKubernetes) -> None:
    api.forbidden.add(PATH)
    with RewardClient(TARGET, timeout_s=10) as client:
        begun = time.monotonic()
        with pytest.raises(PermissionDenied) as caught:
            client.score([[1]])
        assert time.monotonic() - begun < 3
        assert "allow get, list and watch of endpointslices (discovery.k8s.io) there" in str(caught.value)
        assert "dns:///HEADLESS-SERVICE:PORT" in str(caught.value)
        # Once it is allowed nobody needs to be started again.
        with servers(1) as (port, _):
            EndpointController(api, "ppod-reward", {"grpc": port}).ready("a", "127.0.0.11")
            api.forbidden.clear()
            wait_until(lambda: _scores(client), 10)


def _scores(client: RewardClient) -> bool:
    try:
        client.score([[1]])
    except (PermissionDenied, Unauthenticated):
        return False
    return True


def test_an_api_that_is_away_is_named_and_what_was_known_stands(
    api: FakeKubernetes, caplog: pytest.LogCaptureFixture
) -> None:
    with servers(1) as (port, _):
        EndpointController(api, "ppod-reward", {"grpc": port}).ready("a", "127.0.0.11")
        with RewardClient(TARGET, timeout_s=10) as client:
            client.score([[1]])
            api.unavailable = True
            with caplog.at_level(logging.INFO, logger="ppod.client.service_watch"):
                api.cut_watches()
                wait_until(lambda: "ppod-reward in namespace ppod is not watched: " in caplog.text)
                client.score([[1]])
                api.unavailable = False
                wait_until(lambda: "tells of ppod-reward again" in caplog.text, 10)
    api.unavailable = True
    with RewardClient(TARGET, timeout_s=1) as stranger, pytest.raises(Unavailable, match="answers 503"):
        stranger.score([[1]])


@pytest.mark.parametrize(
    "answer", ["{}", "[]", '{"items": null, "metadata": {"resourceVersion": "1"}}', "null", "<html>"]
)
def test_who_answers_in_the_place_of_the_api_is_asked_again(api: FakeKubernetes, answer: str) -> None:
    """As a proxy on the way may, while the API server is replaced."""
    api.answer = answer
    watch = open_service_watch("ppod-reward", None)
    try:
        wait_until(lambda: lists(api) >= 2)
        with pytest.raises(Unavailable, match=r"the Kubernetes API at http://.* does not answer: "):
            watch.wait_for(lambda endpoints: len(endpoints) == 1, 0.1)
        api.answer = None
        EndpointController(api, "ppod-reward", {"grpc": 1}).ready("a", "127.0.0.11")
        watch.wait_for(lambda endpoints: len(endpoints) == 1, 10)
    finally:
        close_service_watch(watch)


@pytest.mark.parametrize("line", ["{}", "null", '{"type": "ADDED"}', '{"type": "ADDED", "object": null}'])
def test_a_watch_outlasts_events_that_are_none(api: FakeKubernetes, line: str) -> None:
    watch = open_service_watch("ppod-reward", None)
    try:
        watch.wait_for(lambda endpoints: not endpoints, 10)
        api.answer = line + "\n"
        before = len(api.requests)
        api.cut_watches()
        wait_until(lambda: len(api.requests) >= before + 2)
        api.answer = None
        EndpointController(api, "ppod-reward", {"grpc": 1}).ready("a", "127.0.0.11")
        watch.wait_for(lambda endpoints: len(endpoints) == 1, 10)
        assert [(one.pod, one.host, one.ready) for one in watch.endpoints] == [("a", "127.0.0.11", True)]
    finally:
        close_service_watch(watch)


def test_watches_that_end_at_once_are_opened_at_intervals(api: FakeKubernetes) -> None:
    """As of an API server that is shutting down: it is asked the more seldom the longer it does so."""
    watch = open_service_watch("ppod-reward", None)
    try:
        watch.wait_for(lambda endpoints: not endpoints, 10)
        api.answer = ""
        before = len(api.requests)
        api.cut_watches()
        wait_until(lambda: len(api.requests) >= before + 3)
        begun = time.monotonic()
        wait_until(lambda: len(api.requests) >= before + 5)
        assert time.monotonic() - begun > 0.5
    finally:
        close_service_watch(watch)


def test_a_service_without_pods_is_named(api: FakeKubernetes) -> None:
    EndpointController(api, "ppod-reward", {"grpc": 1}).ready("a", "127.0.0.11")
    pods = EndpointController(api, "ppod-reward", {"grpc": 1})
    pods.ready("a", "127.0.0.11")
    pods.not_ready("a")
    with RewardClient(TARGET, timeout_s=1) as client, pytest.raises(Unavailable) as caught:
        client.score([[1]])
    assert str(caught.value) == "Service ppod-reward in namespace ppod has no ready pod; 1 are not ready"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"clusters: [\n", "while parsing a flow node"),
        (b"no mapping\n", "does not support item assignment"),
        (b"\xff\xfe", "can't decode byte 0xff"),
    ],
)
def test_a_kubeconfig_that_is_none_is_the_callers_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    (tmp_path / "kubeconfig").write_bytes(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(InvalidArgument) as caught:
        RewardClient(TARGET)
    assert caught.value.field == "target"
    assert caught.value.found.startswith("a k8s: target without a cluster: ")
    assert words in caught.value.found


def test_without_the_package_or_a_cluster_the_target_is_refused(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del api
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidArgument, match="expected a pod's service account, or a kubeconfig"):
        RewardClient(TARGET)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(InvalidArgument, match=r"pip install 'ppod\[kubernetes\]'"):
        RewardClient(TARGET)


def test_a_pods_service_account_is_enough(api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inside a cluster: host and port from the environment, token and namespace from files."""
    from kubernetes.config import incluster_config  # noqa: PLC0415

    from ppod.client import kubernetes_api  # noqa: PLC0415

    for name, text in (("token", "pod-token"), ("ca.crt", "ca"), ("namespace", "team-b")):
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(kubernetes_api, "_NAMESPACE_FILE", tmp_path / "namespace")
    cluster = kubernetes_api.load_cluster()
    assert cluster.namespace == "team-b"
    assert cluster.configuration.host == "https://10.0.0.1:443"
    assert cluster.configuration.api_key == {"BearerToken": "bearer pod-token"}
    del api
