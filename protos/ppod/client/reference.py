"""Clients of ReferenceService."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from ppod.client import reference_calls as calls
from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.identity import ModelDescription, Priority
from ppod.client.reference_calls import LogprobJob, LogprobOptions, ReferenceLogprobs


class ReferenceClient(ServiceClient):
    """Asks a reference policy for the logprobs of given response tokens."""

    service_name = calls.REFERENCE_SERVICE

    def logprobs(
        self,
        sequences: Sequence[npt.ArrayLike],
        prompt_lengths: Sequence[int],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        top_k: int = 0,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ReferenceLogprobs:
        """Compute the logprob of each response token.

        Args:
            sequences: token ids of prompt and response, each of shape [length], without padding.
            prompt_lengths: prompt tokens of each sequence, at least 1.
            temperature: divides the logits before the softmax.
            entropy: also compute the entropy at each response token.
            top_k: also tell so many of the most probable tokens at each response token, 0 to 64.
            priority: who goes first among the team's requests.
            request_id: empty: a new one; repeats of the request carry the same.
            timeout_s: for the whole call; None: the client's.

        Raises:
            PpodError: any class of `ppod.errors`; InvalidArgument names the sample at fault.
        """
        options = LogprobOptions(temperature, entropy, top_k, priority, request_id)
        job = LogprobJob(sequences, prompt_lengths, options, self.pin)
        return self._driver.run(calls.compute(self._core, job, timeout_s))

    def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return self._driver.run(calls.describe(self._core, timeout_s))


class AsyncReferenceClient(AsyncServiceClient):
    """`ReferenceClient` for asyncio: the same calls, awaited."""

    service_name = calls.REFERENCE_SERVICE

    async def logprobs(
        self,
        sequences: Sequence[npt.ArrayLike],
        prompt_lengths: Sequence[int],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        top_k: int = 0,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ReferenceLogprobs:
        """Compute the logprob of each response token. Arguments and errors as for `ReferenceClient.logprobs`."""
        options = LogprobOptions(temperature, entropy, top_k, priority, request_id)
        job = LogprobJob(sequences, prompt_lengths, options, self.pin)
        return await self._driver.run(calls.compute(self._core, job, timeout_s))

    async def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return await self._driver.run(calls.describe(self._core, timeout_s))
