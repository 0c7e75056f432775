"""Each policy finds what it is for: one thing is broken in good manifests, and the policy says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ppod_models.configuration import ConfigError
from support.manifests import Object, Workload, changed, combined, of_kind, overlay, workload

from . import policies

Mutation = Callable[[Sequence[Object]], object]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The base with everything that changes its pods."""
    return combined(
        tmp_path_factory.mktemp("secured"), "base", ("gpu", "tls", "teams", "model-cache", "monitoring", "hpa")
    )


def reward(objects: Sequence[Object]) -> Workload:
    return workload(objects, "reward")


def trainer(objects: Sequence[Object]) -> Workload:
    return workload(objects, "trainer")


def settings(objects: Sequence[Object], file: str, old: str, new: str) -> None:
    """Change the text of a configuration file."""
    [data] = [one["data"] for one in objects if one["kind"] == "ConfigMap" and file in one["data"]]
    assert old in data[file]
    data[file] = data[file].replace(old, new)


MUTATIONS: list[tuple[policies.Policy, str, Mutation]] = [
    (
        policies.restricted,
        "not restricted for warn",
        lambda o: of_kind(o, "Namespace")["ppod"]["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/warn": "baseline"}
        ),
    ),
    (policies.restricted, "runAsNonRoot", lambda o: reward(o).pod["securityContext"].pop("runAsNonRoot")),
    (policies.restricted, "seccompProfile", lambda o: trainer(o).pod["securityContext"].pop("seccompProfile")),
    (
        policies.restricted,
        "read-only",
        lambda o: reward(o).container["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    (
        policies.restricted,
        "capabilities",
        lambda o: reward(o).container["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    ),
    (policies.restricted, "namespace of the host", lambda o: reward(o).pod.update(hostIPC=True)),
    (
        policies.restricted,
        "not allowed",
        lambda o: reward(o).pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    ),
    (policies.least_privilege, "serviceAccountName", lambda o: reward(o).pod.pop("serviceAccountName")),
    (policies.least_privilege, "automount", lambda o: reward(o).pod.pop("automountServiceAccountToken")),
    (
        policies.least_privilege,
        "token into every pod",
        lambda o: of_kind(o, "ServiceAccount")["ppod-reward"].pop("automountServiceAccountToken"),
    ),
    (
        policies.least_privilege,
        "more, or less",
        lambda o: of_kind(o, "Role")["ppod-trainer"]["rules"][0]["verbs"].append("delete"),
    ),
    (
        policies.least_privilege,
        "bound to a role",
        lambda o: of_kind(o, "RoleBinding")["ppod-trainer"]["subjects"].clear(),
    ),
    (policies.least_privilege, "enableServiceLinks", lambda o: reward(o).pod.pop("enableServiceLinks")),
    (policies.graceful_end, "s needed", lambda o: reward(o).pod.update(terminationGracePeriodSeconds=75)),
    (policies.graceful_end, "s needed", lambda o: settings(o, "reward.yaml", "drain_grace_s: 60", "drain_grace_s: 64")),
    (policies.graceful_end, "clients look", lambda o: reward(o).container.pop("lifecycle")),
    (policies.graceful_end, "checkpoint", lambda o: trainer(o).pod.pop("terminationGracePeriodSeconds")),
    (policies.graceful_end, "starts again", lambda o: trainer(o).job["podFailurePolicy"]["rules"].pop()),
    (policies.graceful_end, "number 1", lambda o: trainer(o).pod.pop("shareProcessNamespace")),
    (policies.graceful_end, "go on", lambda o: settings(o, "trainer.yaml", "resume: if_possible", "resume: false")),
    (
        policies.rolling_updates,
        "take a replica away",
        lambda o: reward(o).object["spec"].update(strategy={"type": "Recreate"}),
    ),
    (policies.rolling_updates, "minReadySeconds", lambda o: reward(o).object["spec"].pop("minReadySeconds")),
    (
        policies.rolling_updates,
        "PodDisruptionBudget",
        lambda o: of_kind(o, "PodDisruptionBudget")["ppod-reward"]["spec"].pop("maxUnavailable"),
    ),
    (policies.rolling_updates, "not spread", lambda o: reward(o).pod["topologySpreadConstraints"].pop()),
    (policies.probes, "startupProbe asks", lambda o: reward(o).container["startupProbe"]["grpc"].update(service="")),
    (
        policies.probes,
        "livenessProbe asks",
        lambda o: reward(o).container["livenessProbe"]["grpc"].update(service="ppod.v1.RewardService"),
    ),
    (policies.probes, "speaks TLS", lambda o: reward(o).container["readinessProbe"]["grpc"].update(port=50051)),
    (policies.probes, "too little time", lambda o: reward(o).container["startupProbe"].update(failureThreshold=3)),
    (policies.ports, "container's ports", lambda o: settings(o, "reward.yaml", "port: 50051", "port: 50055")),
    (policies.ports, "listens on", lambda o: settings(o, "reward.yaml", "host: 0.0.0.0", "host: 127.0.0.1")),
    (
        policies.ports,
        "leads elsewhere",
        lambda o: of_kind(o, "Service")["ppod-reward"]["spec"]["ports"][0].update(port=80),
    ),
    (
        policies.ports,
        "appProtocol",
        lambda o: of_kind(o, "Service")["ppod-reward"]["spec"]["ports"][0].pop("appProtocol"),
    ),
    (policies.ports, "clusterIP", lambda o: of_kind(o, "Service")["ppod-reward-headless"]["spec"].pop("clusterIP")),
    (policies.ports, "metrics are on", lambda o: settings(o, "trainer.yaml", "port: 9104", "port: 9105")),
    (
        policies.configurations,
        "no port of a Service",
        lambda o: settings(o, "trainer.yaml", "ppod-reward:grpc", "ppod-rewards:grpc"),
    ),
    (
        policies.configurations,
        "no port of a Service",
        lambda o: settings(o, "trainer.yaml", "ppod-reference:admin", "ppod-reference:administration"),
    ),
    (policies.credentials, "not mounted", lambda o: reward(o).pod["volumes"][0]["projected"]["sources"].pop()),
    (policies.credentials, "not mounted", lambda o: settings(o, "tls-trainer.yaml", "ca.crt", "authority.crt")),
    (
        policies.credentials,
        "port is open",
        lambda o: settings(o, "tls-service.yaml", "open_admin: false", "open_admin: true"),
    ),
    (policies.resources, "no limit, of memory", lambda o: reward(o).container["resources"]["limits"].pop("memory")),
    (policies.resources, "image", lambda o: reward(o).container.update(image="ppod-services:latest")),
    (policies.resources, "thread for each core", lambda o: reward(o).container["env"].pop(0)),
    (policies.resources, "/dev/shm", lambda o: reward(o).pod["volumes"][3].update(emptyDir={})),
    (policies.resources, "nothing is mounted at /runs", lambda o: trainer(o).container["volumeMounts"].pop()),
    (policies.resources, "node that has one", lambda o: reward(o).pod.pop("tolerations")),
    (
        policies.monitors,
        "ppod-reward: is scraped 0 times",
        lambda o: of_kind(o, "Service")["ppod-reward"]["spec"]["ports"].pop(),
    ),
    (
        policies.monitors,
        "ppod-reward: is scraped 2 times",
        lambda o: of_kind(o, "Service")["ppod-reward-headless"]["spec"]["ports"].append({"name": "metrics"}),
    ),
    (policies.monitors, "ppod-trainer: is scraped 0 times", lambda o: trainer(o).labels.clear()),
    (
        policies.monitors,
        "labels are",
        lambda o: of_kind(o, "ServiceMonitor")["ppod-services"]["spec"]["endpoints"][0]["relabelings"].clear(),
    ),
    (
        policies.references,
        "claim",
        lambda o: trainer(o).pod["volumes"][-1]["persistentVolumeClaim"].update(claimName="x"),
    ),
    (policies.references, "its number itself", lambda o: reward(o).object["spec"].update(replicas=3)),
    (policies.references, "namespace is", lambda o: of_kind(o, "Service")["ppod-reward"]["metadata"].pop("namespace")),
]


@pytest.mark.parametrize(
    ("policy", "expected", "mutate"), MUTATIONS, ids=lambda one: one if isinstance(one, str) else one.__name__
)
def test_a_policy_finds_what_it_is_for(
    policy: policies.Policy, expected: str, mutate: Mutation, secured: list[Object]
) -> None:
    objects = changed(secured)
    assert list(policy(objects)) == []
    mutate(objects)
    found = list(policy(objects))
    assert found
    assert any(expected in fault.replace("no request, or no limit", "no limit") for fault in found), found


def test_a_configuration_that_the_code_refuses_is_found(secured: list[Object]) -> None:
    objects = changed(secured)
    settings(objects, "reward.yaml", "drain_grace_s", "drain_grace")
    with pytest.raises(ConfigError, match="drain_grace: unknown key"):
        list(policies.configurations(objects))


def test_every_replica_of_a_reference_can_be_refreshed(secured: list[Object]) -> None:
    objects = changed(secured)
    settings(objects, "trainer.yaml", "steps: 32", "steps: 32\nreference_refresh_steps: 8")
    assert list(policies.configurations(objects)) == []
    settings(objects, "trainer.yaml", "k8s:///ppod-reference:admin", "ppod-reference:50062")
    with pytest.raises(ConfigError, match="two ports of one Service"):
        list(policies.configurations(objects))


RANKS: list[tuple[str, Mutation]] = [
    ("WORLD_SIZE differ", lambda o: trainer(o).job.update(completions=4)),
    ("MASTER_ADDR", lambda o: trainer(o).object["metadata"].update(name="other")),
    ("RANK is", lambda o: trainer(o).environment["RANK"]["valueFrom"]["fieldRef"].update(fieldPath="metadata.name")),
    ("LOCAL_WORLD_SIZE is not told", lambda o: trainer(o).container["env"].pop(-3)),
    ("come back alone", lambda o: trainer(o).job.update(backoffLimit=6)),
    (
        "several nodes",
        lambda o: of_kind(o, "PersistentVolumeClaim")["ppod-runs"]["spec"].update(accessModes=["ReadWriteOnce"]),
    ),
]


@pytest.mark.parametrize(("expected", "mutate"), RANKS, ids=lambda one: one if isinstance(one, str) else "")
def test_broken_ranks_are_found(expected: str, mutate: Mutation) -> None:
    objects = changed(overlay("gpu"))
    assert trainer(objects).kind == "JobSet"
    mutate(objects)
    assert any(expected in fault for fault in policies.ranks(objects))


def test_an_image_without_vllm_is_found() -> None:
    objects = changed(overlay("gpu"))
    assert list(policies.configurations(objects)) == []
    generation = workload(objects, "generation")
    generation.container["image"] = generation.container["image"].replace("generation", "services")
    [fault] = policies.configurations(objects)
    assert "has no vLLM" in fault


def test_every_policy_is_mutated() -> None:
    assert {policy for policy, _, _ in MUTATIONS} | {policies.ranks} == set(policies.POLICIES)


def test_overlays_that_open_a_port_keep_strangers_out_by_a_network_policy(tmp_path: Path) -> None:
    for name in ("cpu", "gpu", "shared-reward"):
        denies = of_kind(overlay(name), "NetworkPolicy")["ppod-default-deny"]["spec"]
        assert denies == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert of_kind(combined(tmp_path, "base", ()), "NetworkPolicy") == {}
