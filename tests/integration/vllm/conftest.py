"""One generation service on vLLM for all tests here: its engine takes many seconds to start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.processes import ServiceProcess
from support.vllm_services import engine_processes, require_vllm, running_vllm, save_vllm_model


@pytest.fixture(scope="session")
def vllm_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vllm_model(tmp_path_factory.mktemp("vllm-model") / "tiny")


@pytest.fixture(scope="session")
def vllm_service(vllm_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """It must also drain on SIGTERM, and leave no process behind."""
    require_vllm()
    with running_vllm(vllm_model_dir, tmp_path_factory.mktemp("vllm")) as service:
        yield service
        processes = engine_processes(service.process.pid)
        service.signal(signal.SIGTERM)
        assert service.wait(60) == 0, service.stderr
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
