"""The trainer's configuration and Job, as they go to the cluster."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import yaml

from ppod_deploy.k8s.commands import K8sTrain
from ppod_deploy.k8s.objects import K8sError, Manifest, items_at, text_at
from ppod_models.configuration import ConfigError, dump_config, parse_config, read_yaml
from ppod_trainer.config import TrainerConfig

_PACKAGED = Path(__file__).with_name("trainer-job.yaml")
_CONFIG_FILE = "trainer.yaml"
_IN_CLUSTER = {
    "reward": "k8s:///ppod-reward:grpc",
    "reference": "k8s:///ppod-reference:grpc",
    "generation": "k8s:///ppod-generation:grpc",
    "generation_admin": "k8s:///ppod-generation:admin",
    "reference_admin": "ppod-reference:50062",
}
_METRICS = {"host": "0.0.0.0", "port": 9104}

Values = dict[str, object]


def cluster_config(path: Path, name: str) -> TrainerConfig:
    """A trainer's configuration, or a run file's, with the cluster's places for what is on this machine.

    Raises:
        ConfigError: it is wrong.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["expected keys and values"])
    given = cast("Values", values)
    # A run file has a section for each service and one for the trainer.
    trainer = dict(cast("Values", given["trainer"])) if isinstance(given.get("trainer"), dict) else dict(given)
    services = _section(trainer, "services")
    for key, target in _IN_CLUSTER.items():
        if _is_here(str(services.get(key, "127.0.0.1"))):
            services[key] = target
    trainer |= {"services": services, "run_dir": f"/runs/{name}"}
    trainer["metrics"] = {**_section(trainer, "metrics"), **_METRICS}
    return parse_config(TrainerConfig, trainer, f"{path} for the cluster")


def config_map(command: K8sTrain, config: TrainerConfig) -> Manifest:
    """The ConfigMap of a run."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": command.name, "namespace": command.where.namespace, "labels": _labels()},
        "data": {_CONFIG_FILE: dump_config(config)},
    }


def job(command: K8sTrain) -> Manifest:
    """The Job of a run. Raises K8sError: the manifest that it is made from is no Job, or has no container."""
    path = command.job or _PACKAGED
    try:
        made = copy.deepcopy(cast("Values", yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (OSError, yaml.YAMLError) as error:
        raise K8sError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    containers = items_at(made, "spec", "template", "spec", "containers")
    if text_at(made, "kind") != "Job" or not containers:
        raise K8sError(f"{path} holds {text_at(made, 'kind') or 'nothing'}; expected a Job with a container")
    metadata = cast("Values", made.setdefault("metadata", {}))
    metadata |= {"name": command.name, "namespace": command.where.namespace}
    metadata["labels"] = {**cast("Mapping[str, str]", metadata.get("labels") or {}), **_labels()}
    container = cast("Values", containers[0])
    if command.image is not None:
        container["image"] = command.image
    container["args"] = ["ppod_trainer.job", "--config", f"/etc/ppod/{_CONFIG_FILE}"]
    _mount(made, command.name)
    return made


def _mount(made: Values, config_map_name: str) -> None:
    """Let the volume at /etc/ppod be the run's ConfigMap."""
    pod = cast("Values", cast("Values", cast("Values", made["spec"])["template"])["spec"])
    container = cast("Values", items_at(pod, "containers")[0])
    mounts = [one for one in items_at(container, "volumeMounts") if text_at(one, "mountPath") == "/etc/ppod"]
    name = text_at(mounts[0], "name") if mounts else "config"
    if not mounts:
        mount: Values = {"name": name, "mountPath": "/etc/ppod", "readOnly": True}
        container["volumeMounts"] = [*items_at(container, "volumeMounts"), mount]
    others = [one for one in items_at(pod, "volumes") if text_at(one, "name") != name]
    pod["volumes"] = [*others, {"name": name, "configMap": {"name": config_map_name}}]


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
