"""Fixtures with services that serve the tiny model in float32; imported by the conftest of whoever needs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.processes import ServiceProcess, running_service


def tiny_model_config(directory: Path) -> dict[str, object]:
    """The tiny model in float32 on one thread."""
    return {"source": str(directory), "device": "cpu", "dtype": "float32", "threads": 1}


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
def reward_service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    model = tiny_model_config(tiny_model_dir)
    values = {
        "models": [{"name": "first", "model": model, "head": "0.5"}, {"name": "second", "model": model, "head": "-1"}],
        "limits": {"max_request_sequences": 16},
    }
    with running_service("support.fake_reward_service", tmp_path_factory.mktemp("reward"), values, admin=False) as up:
        yield up
