"""The trainer's configuration and Job, as they go to the cluster."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

from ppod_deploy.k8s.commands import K8sTrain
from ppod_deploy.k8s.objects import K8sError, Manifest, at, items_at, text_at
from ppod_deploy.k8s.overlays import read_overlay
from ppod_models.configuration import ConfigError, dump_config, named, parse_config, read_layers
from ppod_trainer.config import TrainerConfig

_PACKAGED = Path(__file__).with_name("trainer-job.yaml")
_CONFIG_FILE = "trainer.yaml"
_IN_CLUSTER = {
    "reward": "k8s:///ppod-reward:grpc",
    "reference": "k8s:///ppod-reference:grpc",
    "generation": "k8s:///ppod-generation:grpc",
    "generation_admin": "k8s:///ppod-generation:admin",
    "reference_admin": "k8s:///ppod-reference:admin",
}
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LONGEST_NAME = 63
"""Of a label's value: Kubernetes labels a Job's pods with its name, and refuses the Job otherwise."""
_MADE_THERE = ("run_dir", "weight_transfer.directory")
_METRICS = {"host": "0.0.0.0", "port": 9104}

Values = dict[str, object]


def check_name(name: str) -> None:
    """Raise ConfigError: no Job can have this name, which is that of directories, too."""
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        expected = f"at most {_LONGEST_NAME} lower-case letters, digits, '-' and '.', first and last a letter or digit"
        raise ConfigError("command line", [f"--name: expected {expected}, found {name!r}"])


def cluster_config(paths: Sequence[Path], name: str) -> TrainerConfig:
    """A trainer's configuration, or a run file's, with the cluster's places for what is on this machine.

    Args:
        paths: its files, each laid over those before.
        name: of the run.

    Raises:
        ConfigError: it is wrong.
    """
    if not paths:
        raise ConfigError("command line", ["--config: required, but missing"])
    values = read_layers(*paths)
    if not isinstance(values, dict):
        raise ConfigError(named(*paths), ["expected keys and values"])
    given = cast("Values", values)
    # A run file has a section for each service and one for the trainer.
    trainer = dict(cast("Values", given["trainer"])) if isinstance(given.get("trainer"), dict) else dict(given)
    services = _section(trainer, "services")
    for key, target in _IN_CLUSTER.items():
        if _is_here(str(services.get(key, "127.0.0.1"))):
            services[key] = target
    trainer |= {"services": services, "run_dir": f"/runs/{name}"}
    # A Job's next pod goes on where the last one was.
    trainer.setdefault("resume", "if_possible")
    trainer["metrics"] = {**_section(trainer, "metrics"), **_METRICS}
    return parse_config(TrainerConfig, trainer, f"{named(*paths)} for the cluster")


def paths_here(config: TrainerConfig) -> list[str]:
    """Keys that name a file or directory of this machine, each with it: the pod reads its own."""
    return [
        f"{key}: {value}"
        for key, value in _texts("", config.model_dump(mode="json"))
        if key not in _MADE_THERE and _leads_here(value)
    ]


def _leads_here(text: str) -> bool:
    try:
        path = Path(text).expanduser()
        # Directories without a slash have the names of too many other things.
        return path.is_file() or (os.sep in text and path.is_dir())
    except (OSError, RuntimeError):
        # Most texts are no paths, and may be longer than any, as a list of replicas, or begin with ~.
        return False


def _texts(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, one in cast("Values", value).items():
            yield from _texts(f"{key}.{name}" if key else name, one)
    elif isinstance(value, list):
        for index, one in enumerate(cast("list[object]", value)):
            yield from _texts(f"{key}.{index}", one)
    elif isinstance(value, str):
        yield key, value


def config_map(command: K8sTrain, config: TrainerConfig) -> Manifest:
    """The ConfigMap of a run."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": command.name, "namespace": command.where.namespace, "labels": _labels()},
        "data": {_CONFIG_FILE: dump_config(config)},
    }


def job(command: K8sTrain) -> Manifest:
    """The Job of a run. Raises K8sError: what it is to be made from holds no Job, several, or one without container."""
    source = command.job or str(_PACKAGED)
    jobs = [one for one in read_overlay(source).manifests if text_at(one, "kind") == "Job"]
    if len(jobs) != 1:
        raise K8sError(f"{source} holds {len(jobs)} Jobs; expected one")
    made = copy.deepcopy(cast("Values", jobs[0]))
    containers = items_at(made, "spec", "template", "spec", "containers")
    if not containers:
        raise K8sError(f"the Job of {source} has no container")
    metadata = cast("Values", made.setdefault("metadata", {}))
    metadata |= {"name": command.name, "namespace": command.where.namespace}
    metadata["labels"] = {**cast("Mapping[str, str]", metadata.get("labels") or {}), **_labels()}
    container = cast("Values", containers[0])
    if command.image is not None:
        container["image"] = command.image
    container["args"] = ["ppod_trainer.job", "--config", f"/etc/ppod/{_CONFIG_FILE}", *_laid_over(container)]
    _mount(made, command.name)
    return made


def owned_by(owner: Manifest, manifest: Manifest) -> Manifest:
    """A manifest whose object goes when its owner, an object of the cluster, is deleted."""
    keys = {"apiVersion": text_at(owner, "apiVersion"), "kind": text_at(owner, "kind")}
    reference = keys | {key: text_at(owner, "metadata", key) for key in ("name", "uid")}
    metadata = cast("Values", manifest["metadata"])
    return {**manifest, "metadata": {**metadata, "ownerReferences": [reference]}}


def _mount(made: Values, config_map_name: str) -> None:
    """Let the volume at /etc/ppod hold the run's ConfigMap, beside tokens and certificates where there are any."""
    pod = cast("Values", cast("Values", cast("Values", made["spec"])["template"])["spec"])
    container = cast("Values", items_at(pod, "containers")[0])
    mounts = [one for one in items_at(container, "volumeMounts") if text_at(one, "mountPath") == "/etc/ppod"]
    name = text_at(mounts[0], "name") if mounts else "config"
    if not mounts:
        mount: Values = {"name": name, "mountPath": "/etc/ppod", "readOnly": True}
        container["volumeMounts"] = [*items_at(container, "volumeMounts"), mount]
    volumes = items_at(pod, "volumes")
    old = next((cast("Values", one) for one in volumes if text_at(one, "name") == name), {})
    sources = items_at(old, "projected", "sources")
    new: Values = {"name": name, "configMap": {"name": config_map_name}}
    if sources:
        # Components add to its sources: only the configuration is another one.
        kept = [one for one in sources if not _holds_config(one)]
        projected = {**cast("Values", old["projected"]), "sources": [{"configMap": {"name": config_map_name}}, *kept]}
        new = {"name": name, "projected": projected}
    pod["volumes"] = [new if one is old else one for one in volumes] if old else [*volumes, new]


def _laid_over(container: Values) -> list[str]:
    """The arguments that lay components' settings, such as those of TLS, over the configuration, which comes first."""
    arguments = [str(one) for one in items_at(container, "args")]
    files = [after for flag, after in pairwise(arguments) if flag == "--config"]
    return [argument for file in files[1:] for argument in ("--config", file)]


def _holds_config(source: object) -> bool:
    """Whether a source of the volume is a ConfigMap with the trainer's configuration: a whole one, or that file."""
    if at(source, "configMap") is None:
        return False
    files = items_at(source, "configMap", "items")
    return not files or any(text_at(file, "path") == _CONFIG_FILE for file in files)


def _labels() -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "ppod",
        "app.kubernetes.io/component": "trainer",
        "app.kubernetes.io/part-of": "ppod",
    }


def _section(values: Values, key: str) -> Values:
    found = values.get(key)
    return dict(cast("Values", found)) if isinstance(found, dict) else {}


def _is_here(target: str) -> bool:
    return target.startswith(("127.", "localhost", "[::1]"))
