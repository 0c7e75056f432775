"""Who reaches whom under the network policies: exactly the paths that are needed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from itertools import product

import pytest

from ppod_services.generation.config import GenerationServiceConfig
from support.manifests import KUSTOMIZE, Object, Workload, kustomize, of_kind, overlay, parse, workloads

from .configurations import service_configuration, trainer_configuration
from .policies import POLICIES

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


def _is_port(given: Object, port: tuple[str, int]) -> bool:
    last = given.get("endPort")
    return given["port"] in port if last is None else given["port"] <= port[1] <= last


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
        and ("ports" not in rule or any(_is_port(given, port) for given in rule["ports"]))
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


GROUP_PORTS = {"first": 40000, "last": 49999}


@pytest.fixture(scope="module")
def collective(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The gpu overlay with its comment sign taken away, and with the settings that the component's comment tells."""
    directory = tmp_path_factory.mktemp("collective")
    shutil.copytree(KUSTOMIZE.parent / "monitoring", directory / "monitoring")
    shutil.copytree(KUSTOMIZE, directory / "kustomize")
    gpu = directory / "kustomize" / "overlays" / "gpu"
    text = (gpu / "kustomization.yaml").read_text()
    assert text.count("  # - collective\n") == 1
    (gpu / "kustomization.yaml").write_text(text.replace("# - collective\n", "- collective\n"))
    told = (gpu / "collective" / "kustomization.yaml").read_text()
    for name, key in (("trainer", "weight_transfer"), ("generation", "weights")):
        [line] = re.findall(rf"^#   ({key}: .*)$", told, re.MULTILINE)
        file = gpu / "config" / f"{name}.yaml"
        kept = [one for one in file.read_text().splitlines() if not one.startswith(f"{key}:")]
        file.write_text("\n".join([*kept, line, ""]))
    return parse(kustomize(gpu))


def test_a_process_group_gets_the_ports_that_it_takes_and_no_others(collective: list[Object]) -> None:
    more = {"trainer": {**GROUP_PORTS, "store": 29600, "above": 50000}, "generation": {**GROUP_PORTS, "above": 50000}}
    ours = [replace(one, ports={**one.ports, **more.get(one.name, {})}) for one in map(_pod, workloads(collective))]
    every = set(reached(list(of_kind(collective, "NetworkPolicy").values()), ours))
    among = [("generation", "generation"), ("generation", "trainer"), ("trainer", "generation")]
    # What ranks do among themselves was open before.
    assert {path for path in every if path[:2] != ("trainer", "trainer")} == {
        *(path for path in TRAINING if path[1] in ("reward", "reference", "generation")),
        ("generation", "trainer", "store"),
        *((*pair, port) for pair in among for port in GROUP_PORTS),
    }


def test_a_process_group_listens_where_its_policies_let_it(collective: list[Object]) -> None:
    members = [one for one in workloads(collective) if one.component in ("trainer", "generation")]
    assert len(members) == 2
    given = " ".join(str(port) for port in GROUP_PORTS.values())
    for one in members:
        assert one.pod["securityContext"]["sysctls"] == [{"name": "net.ipv4.ip_local_port_range", "value": given}]
        assert not [port for port in one.ports.values() if 40000 <= port <= 49999]
    assert [fault for policy in POLICIES for fault in policy(collective)] == []
    trainer, generation = sorted(members, key=lambda one: one.component, reverse=True)
    group = trainer_configuration(collective, trainer).weight_transfer.collective
    assert group.port == 29600
    allowed = service_configuration(collective, generation)
    assert isinstance(allowed, GenerationServiceConfig)
    assert allowed.weights.collective_addresses == (f"{group.host}:{group.port}",)
    # The name that rank 0 has in its JobSet.
    assert group.host == trainer.environment["MASTER_ADDR"]["value"]


@pytest.mark.parametrize("name", ["cpu", "gpu", "shared-reward"])
def test_without_its_policies_everything_would_be_open(name: str) -> None:
    """The reading of policies above tells the difference."""
    objects = overlay(name)
    places = [*(_pod(one) for one in workloads(objects)), *_strangers()]
    assert ("stranger", "reward", "admin") in set(reached([], places))
    deny = [one for one in of_kind(objects, "NetworkPolicy").values() if one["metadata"]["name"] == "ppod-default-deny"]
    ours = {one.name for one in places[: len(workloads(objects))]}
    assert not [path for path in reached(deny, places) if ours & set(path[:2])]
