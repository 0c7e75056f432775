"""Modules above vLLM without vLLM: what they import of it is made up, and the test is the engine."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType

_PACKAGE = "ppod_services.generation.vllm_backend"
_ABOVE = ("engine", "host", "weight_store", "worker_transfer")
_NAMES = [f"{_PACKAGE}.{name}" for name in ("api", *_ABOVE)]


@contextmanager
def without_vllm() -> Generator[None]:
    """Within, `engine`, `host` and `weight_store` can be imported; afterwards nobody finds these ones."""
    before = {name: sys.modules.pop(name) for name in _NAMES if name in sys.modules}
    sys.modules[_NAMES[0]] = _api()
    try:
        yield
    finally:
        for name in _NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _api() -> ModuleType:
    """As much of `api` as the modules above import."""
    api = ModuleType(_NAMES[0])
    values: dict[str, object] = {
        "Engine": object,
        "Sampling": object,
        "EngineDeadError": type("EngineDeadError", (Exception,), {}),
        "VLLMValidationError": type("VLLMValidationError", (Exception,), {}),
        "make_sampling": lambda values, **_: values,
        "make_prompt": lambda token_ids: token_ids,
        "init_request": lambda values: values,
        "update_request": lambda values: values,
    }
    vars(api).update(values)
    return api
