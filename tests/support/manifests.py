"""Rendered Kubernetes manifests as tests look at them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import yaml

from support.processes import ROOT

KUSTOMIZE = ROOT / "deploy" / "kustomize"
KUBECTL = Path(sys.executable).parent / "kubectl"
OVERLAYS = ("cpu", "gpu", "shared-reward")
COMPONENTS = ("gpu", "tls", "monitoring", "networkpolicy", "model-cache", "teams")
SCALERS = ("", "hpa", "keda")
"""Both would scale the same Deployment: one of them, or none."""

Object = dict[str, Any]


def pairs() -> list[tuple[str, ...]]:
    """Sets among which each two components are both there, both absent, and one without the other.

    None, each one, all, and all but one.
    """
    most = len(COMPONENTS) + 1
    return [
        one
        for one in combinations()
        if len(one) < 2 or len(one) == most or (len(one) == most - 1 and "keda" not in one)
    ]


def combinations() -> Iterator[tuple[str, ...]]:
    """Every set of components that may be used together."""
    for flags in product((False, True), repeat=len(COMPONENTS)):
        chosen = tuple(name for name, there in zip(COMPONENTS, flags, strict=True) if there)
        for scaler in SCALERS:
            yield (*chosen, scaler) if scaler else chosen


def kustomize(directory: Path) -> str:
    """What `kubectl kustomize` prints."""
    command = [str(KUBECTL), "kustomize", str(directory)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise AssertionError(f"{directory}: {done.stderr}")
    assert not done.stderr, f"{directory}: {done.stderr}"
    return done.stdout


def parse(text: str) -> list[Object]:
    return [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]


@cache
def _overlay(name: str) -> str:
    return kustomize(KUSTOMIZE / "overlays" / name)


def overlay(name: str) -> list[Object]:
    """The objects of an overlay."""
    return parse(_overlay(name))


def combined(directory: Path, root: str, components: Sequence[str]) -> list[Object]:
    """The objects of a base or overlay with components."""
    directory.mkdir(parents=True, exist_ok=True)

    def relative(path: str) -> str:
        return os.path.relpath(KUSTOMIZE / path, directory)

    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(root)],
        "components": [relative(f"components/{name}") for name in components],
    }
    if root == "overlays/gpu":
        references = (KUSTOMIZE / "overlays" / "gpu" / "jobset-references.yaml").read_text()
        (directory / "references.yaml").write_text(references)
        kustomization["configurations"] = ["references.yaml"]
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return parse(kustomize(directory))


@dataclass(frozen=True)
class Workload:
    """What runs pods: a Deployment, a Job or a JobSet with one Job.

    Attributes:
        job: the spec with the pod template.
    """

    object: Object
    job: Object

    @property
    def kind(self) -> str:
        return self.object["kind"]

    @property
    def name(self) -> str:
        return self.object["metadata"]["name"]

    @property
    def component(self) -> str:
        return self.object["metadata"]["labels"]["app.kubernetes.io/component"]

    @property
    def labels(self) -> dict[str, str]:
        return self.job["template"]["metadata"]["labels"]

    @property
    def pod(self) -> Object:
        return self.job["template"]["spec"]

    @property
    def container(self) -> Object:
        [container] = self.pod["containers"]
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {one["name"]: one["containerPort"] for one in self.container["ports"]}

    @property
    def environment(self) -> dict[str, Object]:
        return {one["name"]: one for one in self.container["env"]}

    def arguments(self, option: str) -> list[str]:
        """The values of an option, each time that it is given."""
        args = self.container["args"]
        return [value for key, value in pairwise(args) if key == option]


def workloads(objects: Sequence[Object]) -> list[Workload]:
    found = []
    for one in objects:
        if one["kind"] in ("Deployment", "Job"):
            found.append(Workload(one, one["spec"]))
        elif one["kind"] == "JobSet":
            [replicated] = one["spec"]["replicatedJobs"]
            found.append(Workload(one, replicated["template"]["spec"]))
    return found


def workload(objects: Sequence[Object], component: str) -> Workload:
    [found] = [one for one in workloads(objects) if one.component == component]
    return found


def of_kind(objects: Sequence[Object], kind: str) -> dict[str, Object]:
    """Objects of a kind by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def mounted_files(objects: Sequence[Object], one: Workload) -> dict[str, str]:
    """Paths in the container, of what its projected volumes hold, and the content; for Secrets only their names."""
    maps = of_kind(objects, "ConfigMap")
    mounts = {mount["name"]: mount["mountPath"] for mount in one.container["volumeMounts"]}
    files: dict[str, str] = {}
    for volume in one.pod["volumes"]:
        for source in volume.get("projected", {}).get("sources", []):
            if "configMap" in source:
                given = source["configMap"]
                data = maps[given["name"]]["data"]
                paths = {item["key"]: item["path"] for item in given.get("items", [])} or {key: key for key in data}
                texts = {path: data[key] for key, path in paths.items()}
            else:
                given = source["secret"]
                texts = {item["path"]: f"secret {given['name']}" for item in given["items"]}
            for path, text in texts.items():
                full = f"{mounts[volume['name']]}/{path}"
                assert full not in files, f"{one.name}: {full} is mounted twice"
                files[full] = text
    return files


def changed(objects: Sequence[Object]) -> list[Object]:
    """A copy to change."""
    return copy.deepcopy(list(objects))
