"""`ppod k8s up`, `scale`, `logs` and `down`."""

from __future__ import annotations

import sys
import threading
from contextlib import closing
from queue import SimpleQueue

from ppod_deploy.k8s import kubectl
from ppod_deploy.k8s.cluster import Cluster
from ppod_deploy.k8s.commands import K8sDown, K8sLogs, K8sScale, K8sUp, Where
from ppod_deploy.k8s.objects import Identity, K8sError, identity_of, text_at
from ppod_deploy.k8s.overlays import Overlay, read_overlay
from ppod_deploy.k8s.readiness import wait_ready
from ppod_models.configuration import ConfigError

PART_OF = "app.kubernetes.io/part-of=ppod"
_End = K8sError | OSError | UnicodeError | None
"""How the printing of a log ended."""
_RUNS = ("Job", "JobSet")
_KEPT = ("Namespace", "PersistentVolumeClaim")


def up(command: K8sUp) -> int:
    """Apply an overlay, and wait."""
    where, overlay = command.where, _overlay(command.overlay, command.where)
    manifests = overlay.manifests
    if command.services_only:
        manifests = tuple(one for one in manifests if identity_of(one).kind not in _RUNS)
        kubectl.show_without(where, _RUNS, overlay.option, *kubectl.APPLY)
    else:
        kubectl.show(where, *kubectl.APPLY, *overlay.option)
    deployments = [identity_of(one) for one in manifests if identity_of(one).kind == "Deployment"]
    for one in deployments if command.wait else ():
        kubectl.show(where, "rollout", "status", f"deployment/{one.name}", f"--timeout={command.timeout_s:g}s")
    if where.dry_run:
        return 0
    with closing(Cluster(where.namespace, where.context)) as cluster:
        for manifest in manifests:
            cluster.apply(manifest)
            print(f"applied {identity_of(manifest)}", flush=True)
        if command.wait:
            wait_ready(cluster, deployments, command.timeout_s)
            print(f"ready: {', '.join(one.name for one in deployments) or 'there is no Deployment in it'}")
    return 0


def down(command: K8sDown) -> int:
    """Delete an overlay's objects, the last applied first."""
    where, overlay = command.where, _overlay(command.overlay, command.where)
    identities = [identity_of(manifest) for manifest in reversed(overlay.manifests)]
    going = [one for one in identities if command.everything or one.kind not in _KEPT]
    if len(going) == len(identities):
        kubectl.show(where, "delete", "--ignore-not-found", *overlay.option)
    else:
        names = (f"{one.kind.lower()}/{one.name}" for one in going)
        kubectl.show(where, "delete", "--ignore-not-found", *names)
    if where.dry_run:
        return 0
    with closing(Cluster(where.namespace, where.context)) as cluster:
        for one in going:
            print(f"deleted {one}" if cluster.delete(one) else f"{one} was not there", flush=True)
    for one in identities:
        if one not in going:
            print(f"kept {one}; --everything deletes it too")
    if any(one.kind in _RUNS for one in going):
        wait = ("wait", "--for=delete", "pod", "-l", f"{PART_OF},app.kubernetes.io/component=trainer", "--timeout=20m")
        print(f"a trainer that ran still writes its checkpoint; before another starts: {kubectl.line(where, *wait)}")
    return 0


def _overlay(name: str, where: Where) -> Overlay:
    """An overlay. Raises K8sError: it is of another namespace than was named, which kubectl refuses, too."""
    overlay = read_overlay(name)
    for one in map(identity_of, overlay.manifests):
        if one.namespace not in {"", where.namespace}:
            raise K8sError(
                f"{name} puts {one} into namespace {one.namespace}, and --namespace is {where.namespace}: give "
                f"--namespace {one.namespace}, or change `namespace` in the kustomization"
            )
    return overlay


def scale(command: K8sScale) -> int:
    """Set a service's replicas, and wait."""
    if command.replicas < 0:
        raise ConfigError("command line", [f"replicas: expected 0 or more, found {command.replicas}"])
    where, name = command.where, f"ppod-{command.service}"
    kubectl.show(where, "scale", f"deployment/{name}", f"--replicas={command.replicas}")
    if command.wait:
        kubectl.show(where, "rollout", "status", f"deployment/{name}", f"--timeout={command.timeout_s:g}s")
    if where.dry_run:
        return 0
    with closing(Cluster(where.namespace, where.context)) as cluster:
        cluster.scale(name, command.replicas)
        if command.wait:
            wait_ready(cluster, [Identity("apps/v1", "Deployment", where.namespace, name)], command.timeout_s)
        print(f"{name} has {command.replicas} replicas")
    return 0


def logs(command: K8sLogs) -> int:
    """Print the pods' logs, each line with its pod's name."""
    where = command.where
    labels = f"{PART_OF},app.kubernetes.io/component={command.service}"
    follow = ("-f", "--max-log-requests=100") if command.follow else ()
    kubectl.show(where, "logs", "-l", labels, "--prefix", f"--tail={command.tail}", *follow)
    if where.dry_run:
        return 0
    tail = None if command.tail < 0 else command.tail
    with closing(Cluster(where.namespace, where.context)) as cluster:
        names = [text_at(pod, "metadata", "name") for pod in cluster.list("v1", "Pod", labels)]
        if not names:
            raise K8sError(f"{command.service} has no pod in namespace {where.namespace}")
        ends: SimpleQueue[_End] = SimpleQueue()
        threads = [
            threading.Thread(target=_print_log, args=(cluster, name, command.follow, tail, ends), daemon=True)
            for name in names
        ]
        for thread in threads:
            thread.start()
            if not command.follow:
                thread.join()
        failures: list[K8sError] = []
        for _ in threads:
            end = ends.get()
            if isinstance(end, OSError | UnicodeError):
                # Nobody reads on, or the disk is full: also for what the other pods may yet write.
                raise end
            failures += [] if end is None else [end]
    if failures:
        raise failures[0]
    return 0


def _print_log(cluster: Cluster, pod: str, follow: bool, tail: int | None, ends: SimpleQueue[_End]) -> None:
    end: _End = None
    try:
        for line in cluster.log(pod, follow=follow, tail=tail):
            sys.stdout.write(f"[{pod}] {line}\n")
            sys.stdout.flush()
    except (K8sError, OSError, UnicodeError) as error:
        end = error
    finally:
        # Whatever it was: the end of each is waited for.
        ends.put(end)
