"""Clients of GenerationService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import numpy.typing as npt

from ppod.client import generation_calls as calls
from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.completions import Completion, GenerateOptions, Sampling
from ppod.client.core import ClientCore
from ppod.client.generation_calls import GenerateJob
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
        resumed_tokens: Sequence[int] = (),
    ) -> Iterator[Completion]:
        """Yield each completion as soon as it is finished, in any order; exactly `sampling.n` for each prompt.

        Args:
            prompts: token ids, each of shape [length], without padding.
            sampling: how tokens are drawn.
            seeds: one for each completion, those of the first prompt first, or none. With seeds a stream that breaks is
                resumed.
            weight_version: the version that must sample; None takes the pin's.
            priority: who goes first among the team's requests.
            request_id: empty: a new one.
            timeout_s: for the whole stream; None: the client's.
            resumed_tokens: for each prompt, or none: how many of its last tokens were sampled before, with the same
                seed, as the beginning of the completion; that is how ABORTED ones go on.

        Raises:
            PpodError: any class of `ppod.errors`. InvalidReply: a completion is missing, double or malformed.
        """
        options = GenerateOptions(seeds, weight_version, priority, request_id, resumed_tokens)
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
        resumed_tokens: Sequence[int] = (),
    ) -> list[Completion]:
        """Wait for all completions; in the order of the prompts, and of samples. Arguments and errors as `stream`."""
        options = GenerateOptions(seeds, weight_version, priority, request_id, resumed_tokens)
        job = GenerateJob(prompts, sampling, options, self.pin)
        completions = list(self._driver.stream(_delivery(self._core, job, timeout_s)))
        return sorted(completions, key=_place)

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
        resumed_tokens: Sequence[int] = (),
    ) -> AsyncIterator[Completion]:
        """Yield each completion as soon as it is finished. Arguments and errors as for `GenerationClient.stream`."""
        options = GenerateOptions(seeds, weight_version, priority, request_id, resumed_tokens)
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
        resumed_tokens: Sequence[int] = (),
    ) -> list[Completion]:
        """Wait for all completions; in the order of the prompts, and of samples. Arguments and errors as `stream`."""
        options = GenerateOptions(seeds, weight_version, priority, request_id, resumed_tokens)
        job = GenerateJob(prompts, sampling, options, self.pin)
        completions = [each async for each in self._driver.stream(_delivery(self._core, job, timeout_s))]
        return sorted(completions, key=_place)

    async def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return await self._driver.run(calls.describe(self._core, timeout_s))


def _delivery(core: ClientCore, job: GenerateJob, timeout_s: float | None) -> StreamDelivery[Completion]:
    return StreamDelivery(job, core.shared, core.deadline(timeout_s))


def _place(completion: Completion) -> tuple[int, int]:
    return completion.index, completion.sample
