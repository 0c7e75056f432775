"""`ppod k8s status`: what every pod serves, and what every team uses."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families

from ppod_deploy.k8s import kubectl
from ppod_deploy.k8s.cluster import Cluster
from ppod_deploy.k8s.commands import K8sStatus
from ppod_deploy.k8s.objects import K8sError, Manifest, at, items_at, number_at, text_at
from ppod_deploy.k8s.readiness import pod_trouble
from ppod_models.configuration import ConfigError

_PART_OF = "app.kubernetes.io/part-of=ppod"
_COMPONENT = "app.kubernetes.io/component"
_RANK = "batch.kubernetes.io/job-completion-index"
_ASKED_AT_ONCE = 8
_GPU = re.compile(r"/(gpu(\.shared)?|mig-.+)$")
"""`nvidia.com/gpu`, `amd.com/gpu`; where a plugin divides them `nvidia.com/gpu.shared`, `nvidia.com/mig-3g.40gb`."""


@dataclass(frozen=True, slots=True)
class PodStatus:
    """One pod; None: its /metrics does not tell.

    Attributes:
        state: the pod's phase, "Terminating", or what keeps it from running.
        gpus: that it requests.
        version: of the weights that it serves; of a trainer, the policy's.
        waiting_sequences, waiting_tokens: in its queue.
        step: a trainer's steps done.
    """

    component: str
    pod: str
    node: str
    ready: bool
    state: str
    restarts: int
    age_s: int
    gpus: int
    version: int | None = None
    waiting_sequences: int | None = None
    waiting_tokens: int | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class TeamStatus:
    """What a team did at all pods of a service, since they were started."""

    component: str
    team: str
    served_tokens: int
    waiting_tokens: int
    refused: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """One look at everything.

    Attributes:
        wanted: replicas that each component is to have.
        unread: why the metrics of a pod could not be read, by pod.
    """

    namespace: str
    wanted: Mapping[str, int]
    pods: Sequence[PodStatus]
    teams: Sequence[TeamStatus]
    unread: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class _Sample:
    name: str
    labels: Mapping[str, str]
    value: float


def show(command: K8sStatus) -> int:
    """Print it once, or until Ctrl-C. Raises ConfigError: the interval is none; K8sError: as `look` does."""
    from ppod_deploy.k8s.status_view import print_status, watch_status  # noqa: PLC0415

    where = command.where
    if not 0 < command.interval_s < math.inf:
        raise ConfigError("command line", [f"--interval-s: expected seconds above 0, found {command.interval_s:g}"])
    kubectl.show(where, "get", "deployments,pods", "-l", _PART_OF, "-o", "wide")
    kubectl.show(
        where, "get", "--raw", f"/api/v1/namespaces/{where.namespace}/pods/POD:PORT/proxy/metrics", namespaced=False
    )
    if where.dry_run:
        return 0
    with closing(Cluster(where.namespace, where.context)) as cluster:
        if command.json:
            print(json.dumps(asdict(look(cluster))))
        elif command.once:
            print_status(look(cluster))
        else:
            watch_status(lambda: look(cluster), command.interval_s)
    return 0


def look(cluster: Cluster) -> ClusterStatus:
    """Ask the API and every pod. Raises K8sError: the API refuses, or does not answer."""
    deployments = cluster.list("apps/v1", "Deployment", _PART_OF)
    pods = cluster.list("v1", "Pod", _PART_OF)
    wanted: dict[str, int] = {}
    for one in deployments:
        component = text_at(one, "metadata", "labels", _COMPONENT) or text_at(one, "metadata", "name")
        wanted[component] = wanted.get(component, 0) + number_at(one, "spec", "replicas")
    unread: dict[str, str] = {}

    def read(pod: Manifest) -> list[_Sample]:
        name = text_at(pod, "metadata", "name")
        port = _metrics_port(pod)
        if port is None or text_at(pod, "status", "phase") != "Running":
            return []
        try:
            return _parse(cluster.metrics(name, port))
        except (K8sError, ValueError) as error:
            unread[name] = str(error)
            return []

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        samples = list(pool.map(read, pods))
    rows = sorted(map(_pod_status, pods, samples), key=lambda row: (row.component, row.pod))
    components = [text_at(pod, "metadata", "labels", _COMPONENT) for pod in pods]
    return ClusterStatus(cluster.namespace, wanted, rows, _teams(zip(components, samples, strict=True)), unread)


def _metrics_port(pod: Manifest) -> int | None:
    # Of many ranks only the first exports metrics; the others, of the same template, have nothing on the port.
    if text_at(pod, "metadata", "annotations", _RANK) not in {"", "0"}:
        return None
    for container in items_at(pod, "spec", "containers"):
        for port in items_at(container, "ports"):
            if text_at(port, "name") == "metrics":
                return number_at(port, "containerPort")
    return None


def _parse(text: str) -> list[_Sample]:
    return [
        _Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ppod_")
    ]


def _pod_status(pod: Manifest, samples: Sequence[_Sample]) -> PodStatus:
    # A trainer exports NaN for what it did not measure.
    found = {one.name: int(one.value) for one in samples if not one.labels and math.isfinite(one.value)}
    statuses = items_at(pod, "status", "containerStatuses")
    terminating = text_at(pod, "metadata", "deletionTimestamp")
    version = found.get("ppod_weight_version", found.get("ppod_policy_version"))
    return PodStatus(
        component=text_at(pod, "metadata", "labels", _COMPONENT),
        pod=text_at(pod, "metadata", "name"),
        node=text_at(pod, "spec", "nodeName"),
        ready=bool(statuses) and all(at(status, "ready") is True for status in statuses),
        state="Terminating" if terminating else pod_trouble(pod) or text_at(pod, "status", "phase"),
        restarts=sum(number_at(status, "restartCount") for status in statuses),
        age_s=_age_s(text_at(pod, "metadata", "creationTimestamp")),
        gpus=_gpus(pod),
        version=version,
        waiting_sequences=found.get("ppod_queue_sequences"),
        waiting_tokens=found.get("ppod_queue_tokens"),
        step=found.get("ppod_step"),
    )


def _age_s(created: str) -> int:
    if not created:
        return 0
    return max(0, int(time.time() - datetime.fromisoformat(created).replace(tzinfo=UTC).timestamp()))


def _gpus(pod: Manifest) -> int:
    """Devices that its containers ask for, or parts of some, of any maker: see `_GPU`."""
    total = 0
    for container in items_at(pod, "spec", "containers"):
        limits = at(container, "resources", "limits")
        for name, count in limits.items() if isinstance(limits, dict) else ():  # pyright: ignore[reportUnknownVariableType]
            if _GPU.search(str(name)):  # pyright: ignore[reportUnknownArgumentType]
                total += int(str(count))  # pyright: ignore[reportUnknownArgumentType]
    return total


def _teams(read: Iterable[tuple[str, Sequence[_Sample]]]) -> list[TeamStatus]:
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for component, samples in read:
        for sample in samples:
            team = sample.labels.get("team")
            if team:
                figures = sums.setdefault((component, team), {})
                figures[sample.name] = figures.get(sample.name, 0.0) + sample.value
    return [
        TeamStatus(
            component,
            team,
            int(figures.get("ppod_team_served_tokens_total", 0)),
            int(figures.get("ppod_team_queue_tokens", 0)),
            int(figures.get("ppod_team_refused_total", 0)),
        )
        for (component, team), figures in sorted(sums.items())
    ]
