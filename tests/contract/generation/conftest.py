"""Running services of each backend; tests ask them over the wire, whatever the backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ppod import GenerationClient, WeightClient
from support.broadcasts import ANOTHER_HOST
from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.vllm_services import START_TIMEOUT_S, draining
from support.weight_tensors import weight_tensors

from .backends import BACKENDS, GAPS, Backend, Served


class Pool:
    """Services that start when a test first wants them, and run until the session ends."""

    def __init__(self, model_dir: Path, directory: Path, stack: ExitStack) -> None:
        self._model_dir = model_dir
        self._directory = directory
        self._stack = stack
        self._running: dict[tuple[str, str, str], Served] = {}

    def get(self, backend: Backend, dtype: str, *, purpose: str = "still") -> Served:
        key = backend.name, dtype, "any" if backend.slow_start else purpose
        if key not in self._running:
            self._running[key] = self._start(backend, dtype, purpose)
        return self._running[key]

    def _start(self, backend: Backend, dtype: str, purpose: str) -> Served:
        if backend.requires and importlib.util.find_spec(backend.requires) is None:
            pytest.skip(f"{backend.requires} is not installed here: `make test-{backend.name}` runs this where it is")
        directory = self._directory / f"{backend.name}-{dtype}-{purpose}"
        directory.mkdir()
        values: dict[str, object] = {
            "model": {**tiny_model_config(self._model_dir), "dtype": dtype, "device": backend.device},
            "limits": {"max_request_sequences": 64},
            "weights": {"collective_addresses": ["127.0.0.1:*"]},
            **backend.values,
        }
        if backend.slow_start:
            # An engine that starts processes of its own needs a process as users start it, and ends with it.
            running = running_service(
                backend.module,
                directory,
                values,
                fresh=True,
                start_timeout_s=START_TIMEOUT_S,
                variables=ANOTHER_HOST,
            )
            service = self._stack.enter_context(running)
            self._stack.enter_context(draining(service))
        else:
            running = running_service(backend.module, directory, values, variables=ANOTHER_HOST)
            service = self._stack.enter_context(running)
        return Served(backend, dtype, service, build_model().to(getattr(torch, dtype)))


@pytest.fixture(scope="session")
def pool(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with ExitStack() as stack:
        yield Pool(tiny_model_dir, tmp_path_factory.mktemp("backends"), stack)


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def served(request: pytest.FixtureRequest, pool: Pool) -> Served:
    """Each backend in float32, whose weights nobody changes."""
    return pool.get(request.param, "float32")


@pytest.fixture(scope="session", params=list(GAPS), ids="-".join)
def served_in_each_dtype(request: pytest.FixtureRequest, pool: Pool) -> Served:
    """Each backend in each dtype of `GAPS`."""
    name, dtype = request.param
    return pool.get(next(backend for backend in BACKENDS if backend.name == name), dtype)


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[GenerationClient]:
    with GenerationClient(served.service.target) as client:
        yield client


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def changing(request: pytest.FixtureRequest, pool: Pool) -> Served:
    """Each backend in a service of its own, whose weights tests may change."""
    return pool.get(request.param, "float32", purpose="changing")


@pytest.fixture
def weights(changing: Served) -> Iterator[WeightClient]:
    with WeightClient(changing.service.admin_target) as client:
        yield client
        if changing.backend.slow_start:
            version = client.status().state.weight_version + 1
            client.prepare(version, weight_tensors(changing.model))
            client.commit(version)
