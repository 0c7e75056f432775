"""What the paths and queries of the Kubernetes API mean, for the kinds that the tests use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

KINDS = {
    "v1": {
        "namespaces": ("Namespace", False),
        "pods": ("Pod", True),
        "services": ("Service", True),
        "configmaps": ("ConfigMap", True),
        "secrets": ("Secret", True),
        "serviceaccounts": ("ServiceAccount", True),
    },
    "apps/v1": {"deployments": ("Deployment", True)},
    "batch/v1": {"jobs": ("Job", True)},
    "discovery.k8s.io/v1": {"endpointslices": ("EndpointSlice", True)},
}
_SUBRESOURCES = {"deployments": ["scale", "status"], "pods": ["log"]}


@dataclass(frozen=True)
class Place:
    """What a path names."""

    group: str
    plural: str
    namespace: str
    name: str
    subresource: str


def place_of(path: str) -> Place | None:
    parts = path.strip("/").split("/")
    if parts[0] == "api":
        group, rest = parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) > 2:
        group, rest = f"{parts[1]}/{parts[2]}", parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    rest += [""] * 3
    return Place(group, rest[0], namespace, rest[1], rest[2])


def matches(at: Place, one: Object, place: Place, query: Mapping[str, str]) -> bool:
    if (at.group, at.plural) != (place.group, place.plural) or (place.namespace and at.namespace != place.namespace):
        return False
    labels = one["metadata"].get("labels", {})
    wanted = [part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part]
    if any(labels.get(key) != value for key, value in wanted):
        return False
    return all(
        part.split("=", 1)[1] == one["metadata"]["name"] for part in query.get("fieldSelector", "").split(",") if part
    )


def merged(old: Object, new: Object) -> Object:
    """What an apply or a merge patch makes of an object."""
    result = dict(old)
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def discovery(path: str) -> Object | None:
    """What a client asks to find out which resources there are."""
    if path in {"/version", "/version/"}:
        return {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
    if path in {"/api", "/api/"}:
        return {"kind": "APIVersions", "versions": ["v1"]}
    groups = [name for name in KINDS if "/" in name]
    if path in {"/apis", "/apis/"}:
        described = [{"groupVersion": name, "version": name.split("/")[1]} for name in groups]
        listed = [
            {"name": each["groupVersion"].split("/")[0], "versions": [each], "preferredVersion": each}
            for each in described
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    name = path.strip("/").removeprefix("api/").removeprefix("apis/")
    if name not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": verbs}
        for plural, (kind, namespaced) in KINDS[name].items()
    ]
    resources += [
        {**one, "name": f"{one['name']}/{sub}"} for one in list(resources) for sub in _SUBRESOURCES.get(one["name"], [])
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": resources}
