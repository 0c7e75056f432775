"""Objects against the schemas of every Kubernetes version that is promised, strictly, and of the custom resources."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator

from support.manifests import OVERLAYS, Object, changed, combined, overlay, workload

VERSIONS = ("1.31", "1.34", "1.37")
"""The oldest and the newest that deploy/README.md names, and one between them."""
SCHEMAS = Path(__file__).parent / "schemas"
EVERYTHING = ("gpu", "tls", "monitoring", "networkpolicy", "model-cache", "teams")


@cache
def _custom(kind: str) -> Draft202012Validator | None:
    path = SCHEMAS / f"{kind.lower()}.json"
    return Draft202012Validator(json.loads(path.read_text())) if path.is_file() else None


@cache
def _fault(text: str, version: str) -> str | None:
    """What is wrong with an object, as JSON, that is Kubernetes' own; cached, because most are in every overlay."""
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    return None


def faults(objects: Sequence[Object], version: str) -> list[str]:
    found: list[str] = []
    for one in objects:
        name, validator = f"{one['kind']} {one['metadata']['name']}", _custom(one["kind"])
        own = [one] if validator is None else []
        if validator is not None:
            found += [f"{name}: {error.json_path}: {error.message}" for error in validator.iter_errors(one)]
        if one["kind"] == "JobSet":
            # What is within it is a Job.
            for replicated in one["spec"]["replicatedJobs"]:
                job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
                own.append({**job, "spec": replicated["template"]["spec"]})
        for each in own:
            fault = _fault(json.dumps(each, sort_keys=True), version)
            found += [] if fault is None else [f"{name} in {version}: {fault}"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name: str, version: str) -> None:
    assert faults(overlay(name), version) == []


@pytest.mark.parametrize("scaler", ["hpa", "keda"])
def test_all_components_together_are_valid(scaler: str, tmp_path: Path) -> None:
    objects = combined(tmp_path, "base", (*EVERYTHING, scaler))
    kinds = {one["kind"] for one in objects}
    assert {"Certificate", "Issuer", "ServiceMonitor", "PodMonitor", "PrometheusRule", "NetworkPolicy"} <= kinds
    assert {"HorizontalPodAutoscaler", "ScaledObject"} & kinds
    for version in VERSIONS:
        assert faults(objects, version) == []


def test_every_kind_has_a_schema_and_every_schema_a_kind(tmp_path: Path) -> None:
    kinds = {one["kind"] for name in OVERLAYS for one in overlay(name)}
    kinds |= {one["kind"] for one in combined(tmp_path, "base", ("keda",))}
    assert {path.stem for path in SCHEMAS.glob("*.json")} == {
        kind.lower() for kind in kinds if _custom(kind) is not None
    }
    for path in SCHEMAS.glob("*.json"):
        Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.parametrize("kind", ["Deployment", "Service", "JobSet", "PodMonitor", "PrometheusRule", "NetworkPolicy"])
def test_a_field_that_is_mistyped_is_found(kind: str) -> None:
    objects = changed(overlay("gpu"))
    target = next(one for one in objects if one["kind"] == kind)
    target["spec"]["replica"] = 3
    [fault] = faults([target], VERSIONS[-1])
    assert "replica" in fault


def test_a_mistyped_field_of_the_pods_of_a_job_set_is_found() -> None:
    [target] = [one for one in changed(overlay("gpu")) if one["kind"] == "JobSet"]
    workload([target], "trainer").container["imagePullpolicy"] = "x"
    [fault] = faults([target], VERSIONS[0])
    assert "imagePullpolicy" in fault
