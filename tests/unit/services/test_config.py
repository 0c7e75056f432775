"""Service configuration: bounds, rules between keys, and imports that stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ppod_models.configuration import ConfigError, parse_config
from ppod_services.core.config import ServiceConfig
from ppod_services.generation.config import GenerationServiceConfig
from support.processes import environment

MODEL = {"source": "somewhere"}


def problems(model: type[ServiceConfig], values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(model, values, "test")
    return caught.value.problems


def test_every_fault_is_reported_at_once_with_its_path() -> None:
    values = {
        "listen": {"port": 70_000, "hots": "x"},
        "batching": {"max_batch_size": 0},
        "limits": {"default_deadline_s": -1},
        "drain_grace_s": -2,
    }
    paths = {problem.split(":")[0] for problem in problems(ServiceConfig, values)}
    assert paths == {
        "listen.port",
        "listen.hots",
        "batching.max_batch_size",
        "limits.default_deadline_s",
        "drain_grace_s",
    }


def test_ports_must_differ() -> None:
    [problem] = problems(ServiceConfig, {"listen": {"port": 5000, "metrics_port": 5000}})
    assert problem.startswith("listen:")
    assert "differ" in problem


def test_queue_must_hold_a_batch() -> None:
    [problem] = problems(
        ServiceConfig, {"listen": {"port": 1}, "batching": {"max_batch_tokens": 100, "max_queue_tokens": 99}}
    )
    assert problem.startswith("batching:")


def test_model_is_required() -> None:
    assert problems(GenerationServiceConfig, {"listen": {"port": 1}}) == ["model: required, but missing"]


@pytest.mark.parametrize("service", ["reward", "reference", "generation"])
def test_configuration_and_servicers_import_no_torch(service: str) -> None:
    """Torch takes seconds to import: a port in use must be told at once, and the launcher reads configurations."""
    code = f"import sys, ppod_services.{service}.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
