"""The processes that run one reward function, as the event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from ppod.errors import RewardFailed
from ppod_services.core.admission import OnRefused, untold
from ppod_services.core.callers import Caller
from ppod_services.core.logs import log_event
from ppod_services.reward.backlog import Backlog, Turns
from ppod_services.reward.functions import FunctionSample
from ppod_services.reward.kinds import FunctionConfig

_LOGGER = logging.getLogger(__name__)

_BATCH = 16
"""Texts that go to a process at once: enough to hide the pipe's latency, few enough to share the processes fairly."""

_START_TIMEOUT_S = 60.0
_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class NumberedSample:
    """A sample with the position in its request, for errors."""

    index: int
    sample: FunctionSample


class FunctionPool:
    """Runs a function in `workers` processes, and replaces those that fail or take too long.

    Must be used in one event loop. Raises on use, never gives a value that the function did not return.

    Args:
        config: of the reward.
        on_refused: told of each request for which there is no room.
    """

    def __init__(self, config: FunctionConfig, on_refused: OnRefused = untold) -> None:
        self._config = config
        self._workers = [_Worker(config) for _ in range(config.workers)]
        self._idle = list(self._workers)
        self._turns = Turns(len(self._workers))
        self._jobs: set[asyncio.Task[list[float]]] = set()
        self._backlog = Backlog(f"reward {config.name!r}", config.max_waiting, on_refused)

    async def score(self, samples: Sequence[NumberedSample], caller: Caller) -> list[float]:
        """Score samples in their order; values are as the function returned them, perhaps not finite.

        Raises:
            RewardFailed: the function raised, ended its process, or took longer than `timeout_s` for a sample.
            ResourceExhausted: too many texts wait.
        """
        with self._backlog.hold(caller, len(samples)):
            batches = [samples[start : start + _BATCH] for start in range(0, len(samples), _BATCH)]
            tasks = [asyncio.ensure_future(self._run(batch, caller)) for batch in batches]
            try:
                results = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return [score for result in results for score in result]

    async def start(self) -> None:
        """Start the processes ahead of the first request; a failure is logged and met again by that request."""
        for worker in self._workers:
            try:
                await worker.start()
            except RewardFailed as error:
                log_event(_LOGGER, "function_failed_to_start", {"detail": str(error)}, level=logging.ERROR)

    async def close(self) -> None:
        """End the processes."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        for worker in self._workers:
            await worker.stop()

    async def _run(self, batch: Sequence[NumberedSample], caller: Caller) -> list[float]:
        await self._turns.take(caller, len(batch))
        job = asyncio.ensure_future(self._exchange(self._idle.pop(), batch))
        self._jobs.add(job)
        job.add_done_callback(self._forget)
        # A caller that goes away leaves the process to finish its few texts: to start another one would cost more.
        return await asyncio.shield(job)

    async def _exchange(self, worker: _Worker, batch: Sequence[NumberedSample]) -> list[float]:
        try:
            return await worker.score(batch)
        finally:
            self._idle.append(worker)
            self._turns.give_back()

    def _forget(self, job: asyncio.Task[list[float]]) -> None:
        self._jobs.discard(job)
        if not job.cancelled():
            # Read here, or asyncio would complain about the error of a job whose caller has gone.
            job.exception()


class _Worker:
    """One process. One exchange at a time."""

    def __init__(self, config: FunctionConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the process unless it runs; raise RewardFailed when the function cannot be made."""
        async with self._starting:
            if self._process is not None and _runs(self._process.pid):
                return
            # One that ended between two batches, as by the kernel for want of memory, is no fault of the next batch.
            await self.stop()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ppod_services.reward.functions.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            config = self._config
            async with self._stopped_unless_done():
                await self._send({"function": config.function, "parameters": dict(config.parameters)})
                await self._receive(_START_TIMEOUT_S, None)

    async def score(self, batch: Sequence[NumberedSample]) -> list[float]:
        """Scores in the batch's order; after an error the process is gone, and the next batch starts another."""
        await self.start()
        limit_s = self._config.timeout_s
        scores: list[float] = []
        async with self._stopped_unless_done():
            texts = [[one.sample.prompt, one.sample.response, one.sample.reference] for one in batch]
            await self._send({"samples": texts, "limit_s": limit_s + _GRACE_S})
            for one in batch:
                answer = await self._receive(limit_s, one.index)
                scores.append(float(answer["score"]))
        return scores

    async def stop(self) -> None:
        """Kill the process, and whatever the function started in its session, as to run the code of a response."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # Closes the pipes too; what is left in them is of no use.
        await process.communicate()

    @contextlib.asynccontextmanager
    async def _stopped_unless_done(self) -> AsyncGenerator[None]:
        """Kill the process when the block ends early, in whatever way: what is left in its pipes would be read next."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.stop)
            yield
            stack.pop_all()

    async def _send(self, message: dict[str, object]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        # A process that has ended is told of by its answer, or by the lack of one. uvloop refuses to write to it.
        if self._process.stdin.is_closing():
            return
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.drain()

    async def _receive(self, limit_s: float, sample: int | None) -> dict[str, float]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_s)
        except TimeoutError:
            raise self._failure(f"no score after {limit_s:g} s, and stopped it", sample) from None
        if not line:
            raise self._failure(f"the end of its process, exit code {await self._process.wait()}", sample)
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(str(answer["error"]), sample)
        return answer

    def _failure(self, found: str, sample: int | None) -> RewardFailed:
        function = self._config.function
        return RewardFailed(self._config.name, found, f"a score from the function {function!r}", sample)


def _runs(child: int) -> bool:
    """Whether a child process has not ended. asyncio's own `returncode` tells it only some time later."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # asyncio has seen its end
        return False
