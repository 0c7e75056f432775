"""Waiting until Deployments are ready, and saying why they are not."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ppod_deploy.k8s.cluster import Cluster
from ppod_deploy.k8s.objects import Identity, K8sError, Manifest, at, items_at, number_at, text_at

_POLL_S = 1.0
_BROKEN = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError")


def wait_ready(cluster: Cluster, deployments: Sequence[Identity], timeout_s: float) -> None:
    """Show how many replicas of each are ready until all are.

    Raises:
        K8sError: one is gone, or not ready in time; the message says what its pods lack. Or the API does not answer.
    """
    until = time.monotonic() + timeout_s
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[Identity, TaskID] = {one: progress.add_task(one.name, total=None) for one in deployments}
        known: set[Identity] = set()
        while True:
            waiting: list[Identity] = []
            for one, task in tasks.items():
                try:
                    found = cluster.get(one)
                except K8sError:
                    # The API server may go and come back in so long a wait, but not be away from the start.
                    if one not in known or time.monotonic() >= until:
                        raise
                    waiting.append(one)
                    continue
                known.add(one)
                if found is None:
                    raise K8sError(f"{one} is gone")
                ready, wanted = _ready(found)
                progress.update(task, completed=ready, total=wanted)
                if ready < wanted:
                    waiting.append(one)
            if not waiting:
                return
            if time.monotonic() >= until:
                names = ", ".join(one.name for one in waiting)
                raise K8sError(f"{names} not ready within {timeout_s:g} s{_why(cluster, waiting)}")
            time.sleep(_POLL_S)


def _ready(deployment: Manifest) -> tuple[int, int]:
    """Replicas of the newest template that are available, and how many there are to be."""
    wanted = at(deployment, "spec", "replicas")
    wanted = wanted if isinstance(wanted, int) else 1
    seen = number_at(deployment, "status", "observedGeneration") >= number_at(deployment, "metadata", "generation")
    updated = number_at(deployment, "status", "updatedReplicas")
    available = number_at(deployment, "status", "availableReplicas")
    # Those of an older template may still be going: they are no replicas of this one.
    older = max(0, number_at(deployment, "status", "replicas") - updated)
    ready = min(updated, max(0, available - older), wanted)
    return (ready, wanted) if seen else (0, max(1, wanted))


def _why(cluster: Cluster, waiting: Sequence[Identity]) -> str:
    """What keeps their pods, where the API tells."""
    for one in waiting:
        for pod in cluster.list("v1", "Pod", "app.kubernetes.io/part-of=ppod"):
            if text_at(pod, "metadata", "name").startswith(f"{one.name}-") and (reason := pod_trouble(pod)):
                return f"; {text_at(pod, 'metadata', 'name')}: {reason}"
    return ""


def pod_trouble(pod: Manifest) -> str:
    """Why a pod does not run; empty where nothing is wrong with it."""
    for status in items_at(pod, "status", "containerStatuses"):
        reason = text_at(status, "state", "waiting", "reason")
        if reason in _BROKEN:
            return f"{reason}: {text_at(status, 'state', 'waiting', 'message') or 'no message'}"
    for condition in items_at(pod, "status", "conditions"):
        if text_at(condition, "type") == "PodScheduled" and text_at(condition, "status") == "False":
            return f"{text_at(condition, 'reason')}: {text_at(condition, 'message')}"
    return ""
