"""`ppod k8s train`: a run as a Job, from its configuration to its results on this machine."""

from __future__ import annotations

import base64
import gzip
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import yaml

from ppod_deploy.k8s import kubectl
from ppod_deploy.k8s.cluster import Cluster
from ppod_deploy.k8s.commands import K8sTrain
from ppod_deploy.k8s.kubectl import APPLY
from ppod_deploy.k8s.log_place import LogPlace
from ppod_deploy.k8s.objects import Identity, K8sError, Manifest, at, identity_of, items_at, text_at
from ppod_deploy.k8s.readiness import pod_trouble
from ppod_deploy.k8s.trainer_job import check_name, cluster_config, config_map, job, owned_by, paths_here

_RESULT_MARK = "ppod-result "
"""See ppod_trainer.job."""

_POLL_S = 1.0
_LAST_LINES_S = 30.0
_AWAY_S = 300.0
"""How long a run is followed though the API does not answer, as while its server is replaced, or refuses to."""

_T = TypeVar("_T")


class _PodGone(K8sError):
    """A pod was deleted, as one on a node that is drained."""


def submit(command: K8sTrain) -> int:
    """Submit, follow and fetch; returns the trainer's exit code.

    Raises:
        ConfigError: the configuration or the name is wrong. K8sError: the Job did not get to run.
    """
    check_name(command.name)
    where, output = command.where, command.output or Path("runs") / command.name
    trainer = cluster_config(command.config, command.name)
    for path in paths_here(trainer):
        print(f"{path} is on this machine; the pod needs it in its image or on a volume", file=sys.stderr, flush=True)
    config = config_map(command, trainer)
    manifest = job(command)
    text = yaml.safe_dump_all([dict(config), dict(manifest)], sort_keys=False)
    # What is applied is kept where the results come, so that the line can be typed.
    file = output / "job.yaml"
    kubectl.show(where, *APPLY, "-f", "-" if where.dry_run else str(file))
    if command.follow:
        kubectl.show(where, "logs", "-f", f"job/{command.name}")
    if where.dry_run:
        print(text, end="")
        return 0
    with closing(Cluster(where.namespace, where.context)) as cluster:
        identity = Identity("batch/v1", "Job", where.namespace, command.name)
        if cluster.get(identity) is not None:
            raise K8sError(
                f"{identity} is there already: give another --name, or remove it by "
                f"`{kubectl.line(where, 'delete', f'job/{command.name}', '--cascade=foreground')}`"
            )
        try:
            output.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise K8sError(f"--output: {output} cannot be written: {error.strerror}") from error
        _apply(cluster, config, manifest)
        if not command.follow:
            return 0
        try:
            code = _follow_pods(cluster, command, identity, output)
        except KeyboardInterrupt:
            print(f"the Job goes on; follow it by `{kubectl.line(where, 'logs', '-f', f'job/{command.name}')}`")
            raise
        print(f"{identity} ended with exit code {code}; results in {output}", flush=True)
        return code


def _apply(cluster: Cluster, config: Manifest, manifest: Manifest) -> None:
    cluster.apply(config)
    submitted = cluster.apply(manifest)
    print(f"submitted {identity_of(manifest)}", flush=True)
    try:
        cluster.apply(owned_by(submitted, config))
    except K8sError as error:
        # The run goes on without.
        print(f"{identity_of(config)} will outlive its Job: {error}", file=sys.stderr, flush=True)


def _follow_pods(cluster: Cluster, command: K8sTrain, identity: Identity, output: Path) -> int:
    """One pod after the other, as the Job replaces those that fail or go with their node; the last one's exit code."""
    seen: set[str] = set()
    code, gone = 0, ""
    while (pod := _next_pod(cluster, command, identity, seen)) is not None:
        seen.add(pod)
        try:
            _follow(cluster, pod, output)
            code, gone = _exit_code(cluster, pod), ""
        except _PodGone as error:
            gone = pod
            print(f"{error}; looking for the Job's next pod", file=sys.stderr, flush=True)
    if gone:
        raise K8sError(f"{identity} has ended; its last pod, {gone}, is gone, and its exit code and results with it")
    return code


def _next_pod(cluster: Cluster, command: K8sTrain, identity: Identity, seen: set[str]) -> str | None:
    """The Job's next pod, once its container runs or has run; None where the Job has ended."""
    until, trouble = time.monotonic() + command.timeout_s, "it has no pod yet"
    while time.monotonic() < until:
        job_now = _answer(lambda: cluster.get(identity))
        if job_now is None:
            raise K8sError(f"{identity} is gone: somebody deleted it")
        for pod in _answer(lambda: cluster.list("v1", "Pod", f"job-name={command.name}")):
            name = text_at(pod, "metadata", "name")
            if name in seen or _is_of_another_job(pod, job_now):
                continue
            if text_at(pod, "status", "phase") in {"Running", "Succeeded", "Failed"}:
                return name
            trouble = pod_trouble(pod) or f"its pod is {text_at(pod, 'status', 'phase')}"
        if seen and _ended(job_now):
            return None
        time.sleep(_POLL_S)
    raise K8sError(f"{identity} did not start within {command.timeout_s:g} s: {trouble}")


def _is_of_another_job(pod: Manifest, job_now: Manifest) -> bool:
    """Whether it was started by an earlier Job of the same name, which was deleted and whose pods still end."""
    owners = [text_at(one, "uid") for one in items_at(pod, "metadata", "ownerReferences")]
    return bool(owners) and text_at(job_now, "metadata", "uid") not in owners


def _ended(job_now: Manifest) -> bool:
    """Whether the Job starts no further pod."""
    conditions = items_at(job_now, "status", "conditions")
    return any(
        text_at(one, "type") in {"Complete", "Failed"} and text_at(one, "status") == "True" for one in conditions
    )


def _follow(cluster: Cluster, pod: str, output: Path) -> None:
    """Print the log to its end, through connections that break; results in it become files."""
    parts: dict[str, list[str]] = {}
    place, failures = LogPlace(), 0
    with (output / "trainer.log").open("a", encoding="utf-8") as log:
        while True:
            ended = _terminated(cluster, pod) is not None
            try:
                for stamped in cluster.log(pod, follow=True, tail=None, timestamps=True):
                    failures = 0
                    if (line := place.read(stamped)) is None:
                        continue
                    name, _, part = line.removeprefix(_RESULT_MARK).partition(" ")
                    # A pod may be killed while it writes the line.
                    if line.startswith(_RESULT_MARK) and part:
                        parts.setdefault(name, []).append(part)
                    else:
                        log.write(line + "\n")
                        print(line, flush=True)
            except K8sError as error:
                failures += 1
                if failures * _POLL_S > _AWAY_S:
                    raise
                print(f"the log broke off, asking again: {error}", file=sys.stderr, flush=True)
            else:
                # It had ended before it was read, so what was read is all.
                if ended:
                    break
            time.sleep(_POLL_S)
    for name, encoded in parts.items():
        _write_result(output, name, "".join(encoded))


def _write_result(output: Path, name: str, encoded: str) -> None:
    try:
        content = gzip.decompress(base64.b64decode(encoded))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        # A part was in a file that was rotated away while the connection was broken.
        print(f"{name} did not come whole ({error}); the run's volume holds it", file=sys.stderr, flush=True)
        return
    # A name of the log's is no path of ours.
    (output / Path(name).name).write_bytes(content)


def _exit_code(cluster: Cluster, pod: str) -> int:
    until = time.monotonic() + _LAST_LINES_S
    while time.monotonic() < until:
        code = _terminated(cluster, pod)
        if code is not None:
            return code
        time.sleep(_POLL_S)
    raise K8sError(f"{pod} ended its log and does not say how it ended")


def _terminated(cluster: Cluster, pod: str) -> int | None:
    """The exit code of the pod's container; None while it runs. Raises _PodGone."""
    found: Manifest | None = _answer(lambda: cluster.get(Identity("v1", "Pod", cluster.namespace, pod)))
    if found is None:
        raise _PodGone(f"pod {pod} is gone, and its log with it")
    for status in items_at(found, "status", "containerStatuses"):
        code = at(status, "state", "terminated", "exitCode")
        if isinstance(code, int):
            return code
    return None


def _answer(question: Callable[[], _T]) -> _T:
    """What the API answers. Raises K8sError: it did not for _AWAY_S; the message is that of the last try."""
    until, said = time.monotonic() + _AWAY_S, ""
    while True:
        try:
            return question()
        except K8sError as error:
            if time.monotonic() >= until:
                raise
            if str(error) != said:
                said = str(error)
                print(f"asking again: {error}", file=sys.stderr, flush=True)
            time.sleep(_POLL_S)
