"""Calls of all workers whose failures come as results.

Where a worker's method raises, vLLM (0.32) leaves the answers of the workers behind it in their queues, and takes them
for those of the next call. So none of ppod's methods raises: it returns what went wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppod_services.generation.vllm_backend.api import Engine

_LOGGER = logging.getLogger(__name__)
LOADING_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, OSError)
"""What vLLM's loaders raise for weights that they do not take, and torch for memory that is not there."""


class WorkerError(Exception):
    """A worker could not do what it was asked."""


def failure_of(do: Callable[[], None]) -> str | None:
    """In a worker: load something; what went wrong, or None."""
    try:
        do()
    except LOADING_ERRORS as error:
        _LOGGER.exception("a call of the service failed")
        return f"{type(error).__name__}: {error}"
    return None


async def have_workers(engine: Engine, method: str, *args: object) -> None:
    """In the service: call a method of every worker that returns what `failure_of` does.

    Raises:
        WorkerError: it failed in a worker. Exception: as vLLM tells that there are no workers any more.
    """
    failures = [one for one in await engine.collective_rpc(method, args=args) if one is not None]
    if failures:
        raise WorkerError(failures[0])
