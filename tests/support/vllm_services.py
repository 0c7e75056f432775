"""Generation services on a real vLLM engine; for environments that have vLLM."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil
import pytest

from support.processes import ServiceProcess, running_service
from support.services import TEST_DEVICE, tiny_model_config

BLOCK_SIZE = 32
START_TIMEOUT_S = 240.0
VLLM: dict[str, object] = {
    "kv_cache_gib": 0.125,
    "engine_args": {"block_size": BLOCK_SIZE},
    # On a GPU several engines share one device, and compile nothing.
    **({} if TEST_DEVICE == "cpu" else {"gpu_memory_utilization": 0.05, "enforce_eager": True}),
}
VALUES: dict[str, object] = {"backend": "vllm", "vllm": VLLM}
"""Configuration of the backend for tiny models."""
HALF_LOADING_WORKER = "support.half_loading_worker.HalfLoadingWorker"
HALF_LOADING_VARIABLE = "PPOD_TEST_LOAD_HALF"
"""Environment variable of that worker with the path of a file: while it exists, they load half of a version."""


def require_vllm() -> None:
    """Skip the test where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: `make test-vllm` runs this in an environment that has it")


@contextmanager
def running_vllm(
    model_dir: Path,
    directory: Path,
    further: Mapping[str, Mapping[str, object]] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[ServiceProcess]:
    """A generation service on vLLM, configured with what is `further`; skipped where vLLM is not installed."""
    require_vllm()
    # It has one kind of device, by how it was built.
    values: dict[str, object] = {"model": {**tiny_model_config(model_dir), "device": "auto"}, **VALUES}
    for section, given in (further or {}).items():
        values[section] = {**cast("dict[str, object]", values.get(section, {})), **given}
    module = "ppod_services.generation"
    # As users start it: the engine starts processes of its own.
    with running_service(
        module, directory, values, fresh=True, start_timeout_s=START_TIMEOUT_S, variables=variables
    ) as service:
        yield service


@contextmanager
def draining(service: ServiceProcess) -> Iterator[None]:
    """At the end the service must drain on SIGTERM, and leave no process behind."""
    yield
    processes = engine_processes(service)
    service.signal(signal.SIGTERM)
    assert service.wait(60) == 0, service.stderr
    assert_gone(processes)


def engine_processes(service: ServiceProcess) -> list[psutil.Process]:
    """The processes that a service started, and theirs."""
    return psutil.Process(service.process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    """None of them runs any more, or soon will not."""
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive


def cut_weights_that_wait(service: ServiceProcess) -> None:
    """Take away the second half of the shared memory that holds them: the largest, where bfloat16 or nothing serves.

    All of that size, because memory of a push that failed before may still be there, too.
    """
    directory = Path(f"/proc/{service.process.pid}/fd")
    segments = [link for link in directory.iterdir() if "memfd:ppod-weights" in os.readlink(link)]
    largest = max(link.stat().st_size for link in segments)
    for link in segments:
        if link.stat().st_size == largest:
            os.truncate(link, largest // 2)
