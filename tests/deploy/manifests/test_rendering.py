"""Every overlay, and every set of components on the base, renders and keeps to every policy."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from ppod_models.configuration import load_config
from ppod_services.generation.config import GenerationServiceConfig
from support.manifests import (
    KUSTOMIZE,
    OVERLAYS,
    SCALERS,
    combinations,
    combined,
    kustomize,
    of_kind,
    overlay,
    pairs,
    parse,
    workload,
)

from .policies import POLICIES, Policy


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_keeps_to_the_policy(name: str, policy: Policy) -> None:
    assert list(policy(overlay(name))) == []


def test_a_version_that_waits_has_room_on_the_devices_of_the_gpu_overlay() -> None:
    """By default the workers copy it there while the one before it serves, beside what gpu_memory_utilization takes."""
    config = load_config(GenerationServiceConfig, KUSTOMIZE / "overlays" / "gpu" / "config" / "generation.yaml")
    assert (config.model.source, config.model.dtype) == ("Qwen/Qwen3-8B", "bfloat16")
    assert config.vllm.stage_weights
    device, version, context = 79 * 2**30, 8_190_735_360 * 2, 2 * 2**30
    assert device * (1 - config.vllm.gpu_memory_utilization) > version + context


def test_what_the_comments_of_the_gpu_overlay_offer_works(tmp_path: Path) -> None:
    """TLS, teams and an autoscaler, by taking the comment signs away."""
    shutil.copytree(KUSTOMIZE.parent / "monitoring", tmp_path / "monitoring")
    shutil.copytree(KUSTOMIZE, tmp_path / "kustomize")
    file = tmp_path / "kustomize" / "overlays" / "gpu" / "kustomization.yaml"
    text = file.read_text()
    for line in ("  # - ../../components/tls", "  # - ../../components/teams", "  # - ../../components/keda"):
        assert text.count(f"{line}\n") == 1
        text = text.replace(line, line.replace("# ", ""))
    file.write_text(text.replace("  - {name: ppod-reward, count: 8}\n", ""))
    objects = parse(kustomize(file.parent))
    assert [fault for policy in POLICIES for fault in policy(objects)] == []
    assert workload(objects, "trainer").arguments("--config") == [
        "/etc/ppod/trainer.yaml",
        "/etc/ppod/tls-trainer.yaml",
        "/etc/ppod/teams-trainer.yaml",
    ]


def test_an_overlay_may_be_of_another_namespace(tmp_path: Path) -> None:
    """What it names follows: accounts that are bound, and the pods that monitors look for."""
    combined(tmp_path / "inner", "base", ("monitoring",))
    (tmp_path / "kustomization.yaml").write_text("{namespace: other, resources: [inner]}")
    objects = parse(kustomize(tmp_path))
    assert list(of_kind(objects, "Namespace")) == ["other"]
    places = {one["metadata"].get("namespace") for one in objects if one["kind"] != "Namespace"}
    bound = {one["namespace"] for binding in of_kind(objects, "RoleBinding").values() for one in binding["subjects"]}
    monitored = {
        name
        for kind in ("ServiceMonitor", "PodMonitor")
        for monitor in of_kind(objects, kind).values()
        # Where none is named it is the monitor's own.
        for name in monitor["spec"].get("namespaceSelector", {}).get("matchNames", ["other"])
    }
    assert (places, bound, monitored) == ({"other"}, {"other"}, {"other"})


def _faults(job: tuple[Path, str, tuple[str, ...]]) -> list[str]:
    directory, root, components = job
    objects = combined(directory, root, components)
    return [f"{root} + {components}: {fault}" for policy in POLICIES for fault in policy(objects)]


def test_components_go_together(tmp_path: Path) -> None:
    """Each two in every way on the base, and what the ranks of the gpu overlay may be combined with.

    With PPOD_ALL_COMBINATIONS, as `make lint-manifests` sets it, all 192 on the base: a minute instead of some seconds.
    """
    everything = "PPOD_ALL_COMBINATIONS" in os.environ
    jobs = [("base", chosen) for chosen in (combinations() if everything else pairs())]
    for secured, scaler in product(((), ("tls",), ("teams",), ("tls", "teams")), SCALERS if everything else ("hpa",)):
        jobs.append(("overlays/gpu", (*secured, scaler) if scaler else secured))
    numbered = [(tmp_path / str(number), root, chosen) for number, (root, chosen) in enumerate(jobs)]
    assert len(numbered) == (192 + 12 if everything else 1 + 8 + 2 + 7 + 4)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for some in pool.map(_faults, numbered) for fault in some]
    assert faults == []
