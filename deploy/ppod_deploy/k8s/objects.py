"""Kubernetes objects as `ppod k8s` reads them: JSON, of which only what is asked for is typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

Manifest = Mapping[str, object]
"""One object as its YAML says."""


class K8sError(Exception):
    """Something on the way to or in the cluster failed; the message says what, in one line."""


def at(value: object, *path: str | int) -> object:
    """What is at a path of keys and positions; None where there is nothing."""
    for key in path:
        if isinstance(key, int):
            items = cast("Sequence[object]", value) if isinstance(value, list) else ()
            value = items[key] if len(items) > key else None
        else:
            value = cast("Mapping[str, object]", value).get(key) if isinstance(value, Mapping) else None
    return value


def text_at(value: object, *path: str | int) -> str:
    """The text at a path; empty where there is none."""
    found = at(value, *path)
    return found if isinstance(found, str) else ""


def number_at(value: object, *path: str | int) -> int:
    """The number at a path; 0 where there is none."""
    found = at(value, *path)
    return found if isinstance(found, int) else 0


def items_at(value: object, *path: str | int) -> list[object]:
    """The list at a path; empty where there is none."""
    found = at(value, *path)
    return cast("list[object]", found) if isinstance(found, list) else []


@dataclass(frozen=True, slots=True)
class Identity:
    """Which object."""

    api_version: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


def identity_of(manifest: Manifest) -> Identity:
    """Raises K8sError: the manifest does not say."""
    found = Identity(
        text_at(manifest, "apiVersion"),
        text_at(manifest, "kind"),
        text_at(manifest, "metadata", "namespace"),
        text_at(manifest, "metadata", "name"),
    )
    if not (found.api_version and found.kind and found.name):
        raise K8sError(f"a manifest lacks apiVersion, kind or metadata.name: found {str(found)!r}")
    return found
