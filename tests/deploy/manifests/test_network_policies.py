"""Who reaches whom under the network policies: exactly the paths that are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from itertools import product

import pytest

from support.manifests import Object, Workload, of_kind, overlay, workloads

INNER = ("10.1.2.3", "169.254.169.254", "fd00:ec2::254", "fe80::1")
"""Addresses that are no hub's: of the cluster, and of nodes' metadata."""
Labels = Mapping[str, str]
Path = tuple[str, str, str]


@dataclass(frozen=True)
class Place:
    """A pod, or an address outside of the cluster."""

    name: str
    namespace: Labels = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    address: str = ""

    @property
    def outside(self) -> bool:
        return bool(self.address)


def _selects(selector: Object | None, labels: Labels) -> bool:
    return selector is None or not selector.get("matchLabels", {}).items() - labels.items()


def _is_in(block: Object, address: str) -> bool:
    here = ip_address(address)
    return here in ip_network(block["cidr"]) and not any(here in ip_network(one) for one in block.get("except", ()))


def _is_peer(peer: Object, place: Place) -> bool:
    if "ipBlock" in peer:
        return place.outside and _is_in(peer["ipBlock"], place.address)
    if place.outside:
        return False
    home = {"kubernetes.io/metadata.name": "ppod"}
    # A peer without a namespaceSelector is of the policy's own namespace.
    inside = _selects(peer.get("namespaceSelector", {"matchLabels": home}), place.namespace)
    return inside and _selects(peer.get("podSelector"), place.labels)


def _allows(policies: Sequence[Object], direction: str, here: Place, there: Place, port: tuple[str, int]) -> bool:
    """Whether what selects `here` lets a connection to, or from, `there` pass; what nothing selects is open."""
    if here.outside or here.namespace.get("kubernetes.io/metadata.name") != "ppod":
        return True
    selecting = [
        one["spec"]
        for one in policies
        if direction in one["spec"]["policyTypes"] and _selects(one["spec"]["podSelector"], here.labels)
    ]
    side, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return not selecting or any(
        any(_is_peer(peer, there) for peer in rule[peers])
        and ("ports" not in rule or any(given["port"] in port for given in rule["ports"]))
        for spec in selecting
        for rule in spec.get(side, [])
    )


def reached(policies: Sequence[Object], places: Sequence[Place]) -> Iterator[Path]:
    """All connections that pass, as (from, to, name of the port)."""
    for source, target in product(places, places):
        for port in target.ports.items():
            if source is target and source.outside:
                continue
            if _allows(policies, "Egress", source, target, port) and _allows(policies, "Ingress", target, source, port):
                yield source.name, target.name, port[0]


def _pod(one: Workload) -> Place:
    return Place(one.component, {"kubernetes.io/metadata.name": "ppod"}, one.labels, one.ports)


def _strangers() -> list[Place]:
    def pod(name: str, namespace: str, ports: Mapping[str, int], **labels: str) -> Place:
        space = {"kubernetes.io/metadata.name": namespace}
        return Place(name, space | ({"ppod-reward-access": "true"} if namespace == "search" else {}), labels, ports)

    return [
        pod("dns", "kube-system", {"dns": 53}, **{"k8s-app": "kube-dns"}),
        pod("prometheus", "monitoring", {}),
        pod("team", "search", {"web": 443}),
        pod("stranger", "other", {"web": 8080}),
        pod("lodger", "ppod", {"web": 8080}),
        Place("api-server", ports={"https": 6443}, address="10.0.0.1"),
        Place("api-server-6", ports={"https": 6443}, address="fd00::1"),
        Place("minikube", ports={"https": 8443}, address="192.168.49.2"),
        Place("hub", ports={"https": 443}, address="203.0.113.7"),
        Place("hub-6", ports={"https": 443}, address="2001:db8::7"),
        *(Place(f"inner-{one}", ports={"inner": 443}, address=one) for one in INNER),
    ]


def paths(name: str) -> set[Path]:
    """What passes in an overlay, without what strangers do among themselves."""
    objects = overlay(name)
    ours = [_pod(one) for one in workloads(objects)]
    names = {one.name for one in ours} | {"lodger"}
    every = reached(list(of_kind(objects, "NetworkPolicy").values()), [*ours, *_strangers()])
    return {path for path in every if names & set(path[:2])}


TRAINING = {
    ("trainer", "reward", "grpc"),
    ("trainer", "reference", "grpc"),
    ("trainer", "reference", "admin"),
    ("trainer", "generation", "grpc"),
    ("trainer", "generation", "admin"),
    ("trainer", "trainer", "metrics"),
    ("trainer", "api-server", "https"),
    ("trainer", "minikube", "https"),
    ("trainer", "api-server-6", "https"),
    ("trainer", "hub", "https"),
    ("trainer", "hub-6", "https"),
    *(("trainer", f"inner-{one}", "inner") for one in INNER),
}


def _everyones(*components: str) -> set[Path]:
    return {path for one in components for path in ((one, "dns", "dns"), ("prometheus", one, "metrics"))}


ALL = ("reward", "reference", "generation", "trainer")


def test_on_cpus_only_the_needed_paths_are_open() -> None:
    assert paths("cpu") == TRAINING | _everyones(*ALL)


def test_on_gpus_models_come_from_a_hub() -> None:
    assert paths("gpu") == TRAINING | _everyones(*ALL) | {
        (one, hub, "https") for one in ALL for hub in ("hub", "hub-6")
    }


def test_a_shared_reward_service_is_for_namespaces_that_were_let_in() -> None:
    assert paths("shared-reward") == _everyones("reward") | {
        ("team", "reward", "grpc"),
        ("reward", "hub", "https"),
        ("reward", "hub-6", "https"),
    }


@pytest.mark.parametrize("name", ["cpu", "gpu", "shared-reward"])
def test_without_its_policies_everything_would_be_open(name: str) -> None:
    """The reading of policies above tells the difference."""
    objects = overlay(name)
    places = [*(_pod(one) for one in workloads(objects)), *_strangers()]
    assert ("stranger", "reward", "admin") in set(reached([], places))
    deny = [one for one in of_kind(objects, "NetworkPolicy").values() if one["metadata"]["name"] == "ppod-default-deny"]
    ours = {one.name for one in places[: len(workloads(objects))]}
    assert not [path for path in reached(deny, places) if ours & set(path[:2])]
