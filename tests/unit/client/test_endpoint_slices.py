"""EndpointSlices become pods: merged, deduplicated, with the readiness that the API defines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppod import InvalidArgument
from ppod.client.endpoint_slices import Change, Endpoint, SliceObject, SliceTable
from ppod.client.kubernetes_target import KubernetesTarget, parse_kubernetes_target
from ppod.client.replicas import Replicas, parse_target

PORTS = [{"name": "grpc", "port": 50051}, {"name": "admin", "port": 50061}]


def endpoint(host: str, pod: str = "", **conditions: bool | None) -> dict[str, object]:
    target = {"targetRef": {"name": pod, "uid": f"uid-{pod}"}} if pod else {}
    return {"addresses": [host], "conditions": conditions, **target}


def slices(name: str, *endpoints: dict[str, object], family: str = "IPv4", ports: object = PORTS) -> SliceObject:
    value = {"metadata": {"name": name}, "addressType": family, "endpoints": list(endpoints), "ports": ports}
    return cast("SliceObject", json.loads(json.dumps(value)))


def endpoints_of(*found: SliceObject) -> tuple[Endpoint, ...]:
    table = SliceTable()
    table.replace(found)
    return table.endpoints()


@pytest.mark.parametrize(
    ("conditions", "ready", "serving"),
    [
        ({}, True, True),
        ({"ready": None, "serving": None, "terminating": None}, True, True),
        ({"ready": True}, True, True),
        ({"ready": False}, False, False),
        ({"ready": False, "serving": True, "terminating": True}, False, True),
        ({"ready": False, "serving": False, "terminating": True}, False, False),
        # A Service that publishes pods that are not ready calls them ready even while they end.
        ({"ready": True, "serving": True, "terminating": True}, False, True),
    ],
)
def test_conditions_mean_what_the_api_says(conditions: dict[str, bool | None], ready: bool, serving: bool) -> None:
    [found] = endpoints_of(slices("a", endpoint("10.0.0.1", "p", **conditions)))
    assert (found.ready, found.serving) == (ready, serving)


def test_a_pod_with_two_addresses_is_one_replica() -> None:
    found = endpoints_of(
        slices("six", endpoint("fd00::1", "p"), endpoint("fd00::2", "only-six"), family="IPv6"),
        slices("four", endpoint("10.0.0.1", "p")),
    )
    assert [one.address("grpc") for one in found] == ["[fd00::2]:50051", "10.0.0.1:50051"]


def test_a_pod_in_two_slices_is_one_with_all_its_ports_and_ready_where_one_says_so() -> None:
    [found] = endpoints_of(
        slices("old", endpoint("10.0.0.1", "p", ready=False), ports=PORTS[:1]),
        slices("new", endpoint("10.0.0.1", "p", ready=True), ports=PORTS[1:]),
    )
    assert dict(found.ports) == {"grpc": 50051, "admin": 50061}
    assert found.ready


def test_pods_of_different_templates_have_ports_of_their_own() -> None:
    first, second = endpoints_of(
        slices("a", endpoint("10.0.0.1", "a")),
        slices("b", endpoint("10.0.0.2", "b"), ports=[{"name": "grpc", "port": 6000}]),
    )
    assert (first.address("grpc"), second.address("grpc")) == ("10.0.0.1:50051", "10.0.0.2:6000")
    assert (first.address("admin"), second.address("admin")) == ("10.0.0.1:50061", None)
    assert second.address(7000) == "10.0.0.2:7000"


def test_slices_without_endpoints_ports_or_pods() -> None:
    assert endpoints_of(slices("a", ports=None), cast("SliceObject", {"metadata": {"name": "b"}})) == ()
    nulls = cast("SliceObject", {"metadata": {"name": "c"}, "addressType": "IPv4", "endpoints": None, "ports": None})
    assert endpoints_of(nulls) == ()
    [bare] = endpoints_of(slices("d", endpoint("10.0.0.9"), ports=None))
    assert (bare.pod, bare.address(1), bare.address("grpc")) == ("10.0.0.9", "10.0.0.9:1", None)


def test_changes_replace_and_remove_slices() -> None:
    table = SliceTable()
    table.apply("ADDED", slices("a", endpoint("10.0.0.1", "p")))
    table.apply("ADDED", slices("b", endpoint("10.0.0.2", "q")))
    table.apply("MODIFIED", slices("a", endpoint("10.0.0.3", "r")))
    assert [one.host for one in table.endpoints()] == ["10.0.0.2", "10.0.0.3"]
    table.apply("DELETED", slices("b"))
    table.apply("DELETED", slices("never-there"))
    assert [one.host for one in table.endpoints()] == ["10.0.0.3"]


@given(st.lists(st.tuples(st.sampled_from(["ADDED", "MODIFIED", "DELETED"]), st.integers(0, 3), st.integers(0, 5))))
def test_a_watch_ends_where_a_list_would(changes: list[tuple[Change, int, int]]) -> None:
    table, last = SliceTable(), dict[str, SliceObject]()
    for change, name, pod in changes:
        one = slices(f"slice-{name}", endpoint(f"10.0.0.{pod}", f"pod-{pod}"))
        table.apply(change, one)
        last.pop(f"slice-{name}", None)
        if change != "DELETED":
            last[f"slice-{name}"] = one
    assert table.endpoints() == endpoints_of(*last.values())


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("k8s:///ppod-reward:50051", KubernetesTarget("ppod-reward", None, 50051)),
        ("k8s:///ppod-reward.team-a:grpc", KubernetesTarget("ppod-reward", "team-a", "grpc")),
        ("k8s:///r:9p", KubernetesTarget("r", None, "9p")),
    ],
)
def test_targets(target: str, expected: KubernetesTarget) -> None:
    assert parse_kubernetes_target(target) == expected
    assert parse_target(target).kubernetes == expected
    assert parse_target(target).addresses == ()


@pytest.mark.parametrize(
    "target",
    ["k8s:///", "k8s:///a", "k8s://a:1", "k8s:///a:", "k8s:///a.b.c:1", "k8s:///A:1", "k8s:///a:70000", "k8s:///a:0"],
)
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(InvalidArgument, match="target"):
        parse_kubernetes_target(target)


@pytest.mark.parametrize("target", ["a:65536", "a:1,b:99999", "a", "a:0", "a:http", "dns:///a", "dns:///a:70000"])
def test_a_port_that_there_cannot_be_is_refused(target: str) -> None:
    """gRPC would connect to another one: of 99999 to its last 16 bits, and without any to 443."""
    with pytest.raises(InvalidArgument, match="host:port, the port from 1 to 65535"):
        parse_target(target)


def test_other_targets_of_grpc_are_its_own_to_read() -> None:
    for target in ("[::1]:65535", "unix:///run/a", "ipv4:10.0.0.1:1,10.0.0.2:1"):
        assert parse_target(target).addresses == (target,)


def test_who_asks_small_and_large_things_by_turns_uses_all_replicas() -> None:
    """With turns alone one of two replicas would get all large requests."""
    replicas = Replicas(["a", "b"])
    large: list[str | None] = []
    for _ in range(10):
        for tokens in (1, 1000):
            picked = replicas.pick((), (), tokens)
            assert picked is not None
            replicas.release(picked, tokens)
            if tokens == 1000:
                large.append(picked)
    assert large.count("a") == large.count("b") == 5


def test_a_newcomer_gets_its_share_and_not_all() -> None:
    replicas = Replicas(["a"])
    for _ in range(50):
        picked = replicas.pick((), (), 10)
        assert picked == "a"
        replicas.release("a", 10)
    replicas.replace(["a", "b"])
    picks: list[str | None] = []
    for _ in range(20):
        picks.append(replicas.pick((), (), 10))
        replicas.release(str(picks[-1]), 10)
    assert picks.count("b") == 10


def test_nothing_of_kubernetes_is_imported_without_such_a_target() -> None:
    code = "import sys, ppod, ppod.client; sys.exit('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
