"""The subcommands of `ppod k8s` as plain data: what tyro shows in --help and fills in. Importing this stays cheap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

Positional = tyro.conf.Positional
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
LaidOver = Annotated[
    tuple[Path, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="PATH", help_behavior_hint="(required, repeatable)"),
]
"""Files, each laid over those before it. That one must be given says the program that reads them."""
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="STR")]
Service = Literal["reward", "reference", "generation"]
START_S = 1_800.0
"""As long as the manifests' probes give a service to load its model."""


@dataclass(frozen=True, slots=True)
class Where:
    """Which cluster and namespace."""

    namespace: str = "ppod"
    """Namespace of the workloads."""

    context: OptionalText = None
    """Context of the kubeconfig. Default: the current one; inside a pod, its service account."""

    dry_run: bool = False
    """Print the kubectl lines, and for `train` the manifests, and do nothing."""


@dataclass(frozen=True, slots=True)
class K8sUp:
    """Apply an overlay, and wait until its Deployments are ready.

    Every object is applied by server-side apply with the field manager `ppod`, so what others set stays theirs.
        ppod k8s up --overlay cpu
    """

    overlay: str
    """Name of a shipped overlay, a directory with a kustomization, or a file of rendered manifests."""

    services_only: bool = False
    """Leave out the trainer's Job, for runs that `ppod k8s train` submits."""

    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)

    wait: bool = True
    """Wait until everything is ready."""

    timeout_s: float = START_S
    """Longest wait in seconds: models are downloaded in it. As long as a service's probes give it to start."""


@dataclass(frozen=True, slots=True)
class K8sStatus:
    """Show pods, weight versions, queues, GPUs, and what each team uses; refreshed until Ctrl-C.

    The figures come from the pods' /metrics, through the API server: `pods/proxy` must be allowed.
    """

    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)

    once: bool = False
    """Print it once and end."""

    json: bool = False
    """Print one JSON object and end."""

    interval_s: float = 2.0
    """Seconds between two looks."""


@dataclass(frozen=True, slots=True)
class K8sTrain:
    """Run the trainer as a Job, follow its log, and fetch its results.

    Takes a trainer's YAML, or a run file, whose trainer section is used. Services that it leaves at this machine become
    those of the namespace. Exit code: the trainer's own; 1 where the Job did not get to run.
        ppod k8s train --config my.yaml --image registry.example/ppod-trainer:1.0
    """

    config: LaidOver
    """YAML file: a trainer's, or a run file; given again: values that are laid over those before."""

    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)

    name: str = "ppod-trainer"
    """Name of the Job."""

    image: OptionalText = None
    """Image of the trainer. Default: the one in the Job's manifest."""

    job: OptionalText = None
    """The Job whose first container is to train: an overlay's, by its name or directory, or a file's. Default: a
    packaged one, without GPUs or lasting volumes."""

    output: OptionalPath = None
    """Directory for the results: report.txt, metrics.jsonl, the log. Default: runs/NAME."""

    follow: bool = True
    """Follow the log to the end. Without it the Job is only submitted."""

    timeout_s: float = 900.0
    """Longest wait for the Job's pod to start, in seconds."""


@dataclass(frozen=True, slots=True)
class K8sScale:
    """Set the number of replicas of one service, and wait until they are ready."""

    service: Positional[Service]
    """Which service."""

    replicas: Positional[int]
    """How many."""

    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)

    wait: bool = True
    """Wait until all are ready."""

    timeout_s: float = START_S
    """Longest wait in seconds."""


@dataclass(frozen=True, slots=True)
class K8sLogs:
    """Print the logs of all pods of a service, or of the trainer."""

    service: Positional[Literal["reward", "reference", "generation", "trainer"]]
    """Whose."""

    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)

    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Go on until Ctrl-C."""

    tail: int = 100
    """How many lines of each pod; -1: all."""


@dataclass(frozen=True, slots=True)
class K8sDown:
    """Delete the objects of an overlay. Volumes and the namespace stay, unless --everything."""

    overlay: str
    """What `ppod k8s up` was given."""

    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)

    everything: bool = False
    """Delete PersistentVolumeClaims and Namespaces too: checkpoints and downloaded models are lost."""


AnyK8s = K8sUp | K8sStatus | K8sTrain | K8sScale | K8sLogs | K8sDown


@dataclass(frozen=True, slots=True)
class K8s:
    """Run ppod on a Kubernetes cluster: up, status, train, scale, logs, down.

    Speaks to the API by the kubeconfig, or inside a pod by its service account, and prints the kubectl line of
    everything that it does. Exit code: 0 done; 1 a failure, named; 2 the command line or a file is wrong; 130 Ctrl-C.
    """

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[K8sUp, tyro.conf.subcommand("up")]
        | Annotated[K8sStatus, tyro.conf.subcommand("status")]
        | Annotated[K8sTrain, tyro.conf.subcommand("train")]
        | Annotated[K8sScale, tyro.conf.subcommand("scale")]
        | Annotated[K8sLogs, tyro.conf.subcommand("logs")]
        | Annotated[K8sDown, tyro.conf.subcommand("down")]
    ]
