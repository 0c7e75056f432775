"""Fixtures with services that serve the tiny model in float32; imported by the conftest of whoever needs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.processes import ServiceProcess, running_service
from support.tiny_head import save_tiny_head
from support.tiny_model import save_nan_model

TEST_DEVICE = os.environ.get("PPOD_TEST_DEVICE", "cpu")
"""Where the services of most tests compute: `make test-cuda` names a CUDA device."""
FLOAT32_GAP = 2e-5 if TEST_DEVICE == "cpu" else 5e-5
"""Most nats between a logprob that a float32 service tells and the one of a full forward, which is the CPU's."""


def tiny_model_config(directory: Path) -> dict[str, object]:
    """The tiny model in float32 on one thread."""
    return {"source": str(directory), "device": TEST_DEVICE, "dtype": "float32", "threads": 1}


@pytest.fixture(scope="session")
def generation_service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    values = {"model": tiny_model_config(tiny_model_dir), "limits": {"max_request_sequences": 16}}
    with running_service("ppod_services.generation", tmp_path_factory.mktemp("generation"), values) as service:
        yield service


@pytest.fixture(scope="session")
def reference_service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    values = {"model": tiny_model_config(tiny_model_dir), "limits": {"max_request_sequences": 16}}
    with running_service("ppod_services.reference", tmp_path_factory.mktemp("reference"), values) as service:
        yield service


@pytest.fixture(scope="session")
def tiny_heads(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of two heads for the tiny model."""
    directory = tmp_path_factory.mktemp("heads")
    names = ("first", "second")
    return {name: save_tiny_head(tiny_model_dir, directory / name, name=name, seed=i) for i, name in enumerate(names)}


@pytest.fixture(scope="session")
def reward_service(
    tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """Two heads on the tiny model, and "broken" on a model with NaN in one embedding."""
    model = tiny_model_config(tiny_model_dir)
    nan_dir = save_nan_model(tiny_model_dir, tmp_path_factory.mktemp("nan") / "model")
    nan_head = save_tiny_head(nan_dir, tmp_path_factory.mktemp("nan") / "head", name="broken")
    values = {
        "rewards": [
            *({"name": name, "model": model, "head": str(head)} for name, head in tiny_heads.items()),
            {"name": "broken", "model": tiny_model_config(nan_dir), "head": str(nan_head)},
        ],
        "limits": {"max_request_sequences": 16},
    }
    with running_service("ppod_services.reward", tmp_path_factory.mktemp("reward"), values) as service:
        yield service
