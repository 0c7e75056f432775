"""The engine in an event loop and a thread of its own, so that neither the service's loop nor its model thread is held."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import uvloop

from ppod.errors import Unavailable
from ppod_services.generation.vllm_backend.api import Engine, Sampling, make_prompt
from ppod_services.generation.vllm_backend.outputs import RequestOutput

ResultT = TypeVar("ResultT")

_LOOK_S = 0.2
"""How often a wait looks whether the engine is still there: answers of a process that was killed never come."""
_CALL_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 20.0

Answer = concurrent.futures.Future[RequestOutput | None]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One completion to start: its id is given by `EngineHost.new_id`, `done` is told of its end."""

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    done: Callable[[Answer], None]


class EngineHost:
    """Runs the engine; its methods are called from other threads than the engine's.

    Args:
        start: makes the engine, in its own loop.
    """

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._ids = itertools.count()
        self._failure: str | None = None
        self._thread.start()
        self._engine = self._submit(_start(start)).result()

    @property
    def failure(self) -> str | None:
        """Why the engine can serve no more; None while it can."""
        if self._failure is None and self._engine.errored:
            self._failure = "vLLM's engine processes ended; the service's log tells why"
        return self._failure

    def fail(self, reason: str) -> None:
        """Serve no more."""
        self._failure = self._failure or reason

    def check(self) -> None:
        """Raise Unavailable when the engine can serve no more."""
        if (failure := self.failure) is not None:
            raise Unavailable(failure)

    def new_id(self) -> str:
        """An id for a request that no other had."""
        return f"ppod-{next(self._ids)}"

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Start completions; each `done` is called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._begin, prompts)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End completions; what they have comes as their answers. Unknown ids do nothing."""
        self._submit(self._engine.abort(list(request_ids)))

    def wait(
        self, make: Callable[[Engine], Coroutine[object, object, ResultT]]
    ) -> concurrent.futures.Future[ResultT]:
        """Run a coroutine of the engine, and wait until it has its result or its error.

        Raises:
            Unavailable: the engine ended meanwhile, or gave no answer for minutes.
        """
        future = self._submit(make(self._engine))
        until = time.monotonic() + _CALL_TIMEOUT_S
        while not concurrent.futures.wait([future], _LOOK_S).done:
            if time.monotonic() > until:
                self.fail(f"vLLM's engine did not answer within {_CALL_TIMEOUT_S:.0f} s")
            if self.failure is not None:
                future.cancel()
                self.check()
        return future

    def call(self, make: Callable[[Engine], Coroutine[object, object, ResultT]]) -> ResultT:
        """As `wait`, but returns the result, or raises the error."""
        return self.wait(make).result()

    def close(self) -> None:
        """End the engine's processes and the thread. Slow."""
        self._engine.shutdown(_STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    def _submit(self, coroutine: Coroutine[object, object, ResultT]) -> concurrent.futures.Future[ResultT]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._submit(self._complete(prompt)).add_done_callback(prompt.done)

    async def _complete(self, prompt: Prompt) -> RequestOutput | None:
        """The last output of a request; None where it has none."""
        last: RequestOutput | None = None
        async for output in self._engine.generate(make_prompt(prompt.token_ids), prompt.sampling, prompt.request_id):
            last = output
        return last


async def _start(start: Callable[[], Engine]) -> Engine:
    engine = start()
    # From here on a request is known to the engine as soon as its task has begun, so that an abort finds it.
    await engine.get_supported_tasks()
    return engine
