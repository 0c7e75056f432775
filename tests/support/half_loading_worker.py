"""A vLLM worker whose transfer engine, while a file says so, fails when it has loaded half of what it received.

Or all of it, where that was loaded beside what serves.

It is vLLM's own worker otherwise. Name it as vLLM's engine argument `worker_cls`; see `HALF_LOADING_VARIABLE`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from ppod_services.generation.vllm_backend import transfer_engine
from ppod_services.generation.vllm_backend.reload import load_pushed
from ppod_services.generation.vllm_backend.standby import Standby
from support.vllm_services import HALF_LOADING_VARIABLE

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker  # pyright: ignore
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker  # pyright: ignore


class HalfLoadingWorker(VllmWorker):  # pyright: ignore[reportUntypedBaseClass]
    """See the module."""


def _reload(config: Any, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    found = list(weights)
    if _fails():
        found = list(islice(found, len(found) // 2))
    load_pushed(config, model, found)


def _install(standby: Standby) -> None:
    _INSTALL(standby)
    if _fails():
        raise RuntimeError("as the device tells what went wrong there")


def _fails() -> bool:
    return Path(os.environ[HALF_LOADING_VARIABLE]).exists()


_INSTALL = Standby.install
Standby.install = _install
transfer_engine.load_pushed = _reload
