"""The engine in an event loop and a thread of its own: neither the service's loop nor its model's thread is held."""

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

from ppod.errors import Internal, Unavailable
from ppod_services.generation.vllm_backend.api import Engine, Sampling, make_prompt
from ppod_services.generation.vllm_backend.completions import OutsideStops
from ppod_services.generation.vllm_backend.outputs import Ended

ResultT = TypeVar("ResultT")

_LOOK_S = 0.2
"""How often a wait looks whether the engine is still there: answers of a process that was killed never come."""
_CALL_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 20.0

Answer = asyncio.Task[Ended]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One completion to start.

    Attributes:
        request_id: given by `EngineHost.new_id`.
        token_ids: what to complete.
        sampling: how; stepwise with `stops`.
        pinned: whether new weights end it: it insists on those that serve when it begins.
        stops: looks for stop texts that vLLM cannot find; None: there are none.
        done: told of its end, in the engine's thread.
    """

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    pinned: bool
    stops: OutsideStops | None
    done: Callable[[Answer], None]


class EngineHost:
    """Runs the engine; its methods are called from other threads than the engine's.

    Args:
        start: makes the engine, in its own loop.
        start_timeout_s: longest that it may take; none: for ever.

    Raises:
        TimeoutError: it took longer, and may go on: nothing else ends it than the end of this process.
    """

    def __init__(self, start: Callable[[], Engine], start_timeout_s: float | None = None) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._ids = itertools.count()
        self._failure: str | None = None
        self._pinned: set[str] = set()
        self._tasks: set[Answer] = set()
        self._thread.start()
        # vLLM itself waits for ever for a process of the engine that does not end.
        self._engine = self._submit(_start(start)).result(start_timeout_s)

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

    async def pause(self, engine: Engine) -> None:
        """Let all sequences stand still, and end those that insist on the weights that are about to go.

        Those that go on are computed anew: what they and the prefix cache hold was made by the old weights.
        """
        await engine.abort(list(self._pinned))
        # Its `pause_generation` does no more for text, and then sleeps for 20 ms, for callers who want to have all
        # outputs of before by then. Which version made a token is noted where it is made.
        await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)

    def wait(self, make: Callable[[Engine], Coroutine[object, object, ResultT]]) -> concurrent.futures.Future[ResultT]:
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
        # At once, and not by way of another callback: an abort that comes next must find them.
        for prompt in prompts:
            task = self._loop.create_task(self._complete(prompt))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(prompt.done)

    async def _complete(self, prompt: Prompt) -> Ended:
        if prompt.pinned:
            self._pinned.add(prompt.request_id)
        ended: Ended | None = None
        try:
            async for output in self._engine.generate(
                make_prompt(prompt.token_ids), prompt.sampling, prompt.request_id
            ):
                ended = Ended(output.outputs[0])
                if prompt.stops is not None and prompt.stops.look(output.outputs[0].token_ids):
                    ended = Ended(output.outputs[0], prompt.stops.tokens)
                    # Its last word comes next.
                    await self._engine.abort([prompt.request_id])
        finally:
            self._pinned.discard(prompt.request_id)
        if ended is None:
            raise Internal("vLLM ended a completion without any output")
        return ended


async def _start(start: Callable[[], Engine]) -> Engine:
    engine = start()
    # From here on a request is known to the engine as soon as its task has begun, so that an abort finds it.
    await engine.get_supported_tasks()
    return engine
