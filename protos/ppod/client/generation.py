"""Clients of GenerationService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import numpy.typing as npt

from ppod.client import generation_calls as calls
from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.core import ClientCore
from ppod.client.generation_calls import Completion, GenerateJob, GenerateOptions, Sampling
from ppod.client.identity import ModelDescription, Priority
from ppod.client.streaming import StreamDelivery


class GenerationClient(ServiceClient):
    """Samples completions of prompts."""

    service_name = calls.GENERATION_SERVICE

    def stream(
        self,
        prompts: Sequence[npt.ArrayLike],
        sampling: Sampling,
        *,
        seeds: Sequence[int] = (),
        weight_version: int | None = None,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[Completion]:
        """Yield each completion as soon as it is finished, in any order; exactly one for each prompt.

        Args:
            prompts: token ids, each of shape [length], without padding.
            sampling: how tokens are drawn.
            seeds: one for each prompt, or none. With seeds a stream that breaks is resumed.
            weight_version: the version that must sample; None takes the pin's.
            priority: who goes first among the team's requests.
            request_id: empty: a new one.
            timeout_s: for the whole stream; None: the client's.

        Raises:
            PpodError: any class of `ppod.errors`. InvalidReply: a completion is missing, double or malformed.
        """
        options = GenerateOptions(seeds, weight_version, priority, request_id)
        job = GenerateJob(prompts, sampling, options, self.pin)
        return self._driver.stream(_delivery(self._core, job, timeout_s))

    def generate(
        self,
        prompts: Sequence[npt.ArrayLike],
        sampling: Sampling,
        *,
        seeds: Sequence[int] = (),
        weight_version: int | None = None,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """Wait for all completions and return them in the order of the prompts. Arguments and errors as `stream`."""
        options = GenerateOptions(seeds, weight_version, priority, request_id)
        job = GenerateJob(prompts, sampling, options, self.pin)
        completions = list(self._driver.stream(_delivery(self._core, job, timeout_s)))
        return sorted(completions, key=lambda completion: completion.index)

    def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return self._driver.run(calls.describe(self._core, timeout_s))


class AsyncGenerationClient(AsyncServiceClient):
    """`GenerationClient` for asyncio: the same calls, awaited."""

    service_name = calls.GENERATION_SERVICE

    def stream(
        self,
        prompts: Sequence[npt.ArrayLike],
        sampling: Sampling,
        *,
        seeds: Sequence[int] = (),
        weight_version: int | None = None,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[Completion]:
        """Yield each completion as soon as it is finished. Arguments and errors as for `GenerationClient.stream`."""
        options = GenerateOptions(seeds, weight_version, priority, request_id)
        job = GenerateJob(prompts, sampling, options, self.pin)
        return self._driver.stream(_delivery(self._core, job, timeout_s))

    async def generate(
        self,
        prompts: Sequence[npt.ArrayLike],
        sampling: Sampling,
        *,
        seeds: Sequence[int] = (),
        weight_version: int | None = None,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """Wait for all completions and return them in the order of the prompts. Arguments and errors as `stream`."""
        options = GenerateOptions(seeds, weight_version, priority, request_id)
        job = GenerateJob(prompts, sampling, options, self.pin)
        completions = [each async for each in self._driver.stream(_delivery(self._core, job, timeout_s))]
        return sorted(completions, key=lambda completion: completion.index)

    async def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return await self._driver.run(calls.describe(self._core, timeout_s))


def _delivery(core: ClientCore, job: GenerateJob, timeout_s: float | None) -> StreamDelivery[Completion]:
    return StreamDelivery(job, core.shared, core.deadline(timeout_s))
