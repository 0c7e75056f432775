"""Clients of RewardService."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from ppod.client import reward_calls as calls
from ppod.client.base import AsyncServiceClient, ServiceClient
from ppod.client.breakdown import RewardDescription
from ppod.client.identity import ModelDescription, Priority
from ppod.client.reward_calls import ChatTurn, Granularity, ScoreOptions, Scores, Truncation


class RewardClient(ServiceClient):
    """Scores token sequences, texts or conversations.

    >>> with RewardClient("localhost:50051") as reward:  # doctest: +SKIP
    ...     reward.score_texts(["A joy from start to end."]).values
    """

    service_name = calls.REWARD_SERVICE

    def score(  # noqa: PLR0913 - the fields of the message, by name
        self,
        sequences: Sequence[npt.ArrayLike],
        *,
        prompt_lengths: Sequence[int] = (),
        prompts: Sequence[Sequence[ChatTurn]] = (),
        references: Sequence[str] = (),
        process: Granularity | int | None = None,
        truncation: Truncation = Truncation.NONE,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score token sequences.

        Args:
            sequences: token ids of prompt and response, each of shape [length], without padding.
            prompt_lengths: prompt tokens of each sequence; empty: the whole sequence is response.
            prompts: the turns that each prompt was made of, for what reads text instead of these ids: models of another
                tokenizer, by their own chat template, functions and judges. Without turns its ids are decoded.
            references: what rewards that check an answer hold each response against; empty: nothing.
            process: also score the way: each step, each response token, or the first token, every so many behind it,
                and the last.
            truncation: what to do with a sequence longer than the model takes.
            priority: who goes first among the team's requests.
            request_id: empty: a new one; repeats of the request carry the same.
            timeout_s: for the whole call; None: the client's.

        Raises:
            PpodError: any class of `ppod.errors`; InvalidArgument names the sample at fault, InvalidReply the field of
                a reply that breaks the contract.
        """
        options = ScoreOptions(truncation, references, process, priority, request_id)
        job = calls.token_job(sequences, prompt_lengths, prompts, options, self.pin)
        return self._driver.run(calls.score(self._core, job, timeout_s))

    def score_texts(
        self,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] = (),
        references: Sequence[str] = (),
        process: Granularity | None = None,
        truncation: Truncation = Truncation.NONE,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score texts, which the server tokenises itself; `prompts` stand before them, one each or none.

        Other arguments and errors as for `score`.
        """
        options = ScoreOptions(truncation, references, process, priority, request_id)
        return self._driver.run(calls.score(self._core, calls.text_job(texts, prompts, options, self.pin), timeout_s))

    def score_conversations(
        self,
        conversations: Sequence[Sequence[ChatTurn]],
        *,
        references: Sequence[str] = (),
        process: Granularity | None = None,
        truncation: Truncation = Truncation.NONE,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score the last turn of each conversation; the server applies the model's chat template.

        Other arguments and errors as for `score`.
        """
        options = ScoreOptions(truncation, references, process, priority, request_id)
        job = calls.conversation_job(conversations, options, self.pin)
        return self._driver.run(calls.score(self._core, job, timeout_s))

    def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return self._driver.run(calls.describe(self._core, timeout_s))

    def list_rewards(self, *, timeout_s: float | None = None) -> tuple[RewardDescription, ...]:
        """Ask for every reward of the service, the default first."""
        return self._driver.run(calls.list_rewards(self._core, timeout_s))


class AsyncRewardClient(AsyncServiceClient):
    """`RewardClient` for asyncio: the same calls, awaited."""

    service_name = calls.REWARD_SERVICE

    async def score(  # noqa: PLR0913 - as above
        self,
        sequences: Sequence[npt.ArrayLike],
        *,
        prompt_lengths: Sequence[int] = (),
        prompts: Sequence[Sequence[ChatTurn]] = (),
        references: Sequence[str] = (),
        process: Granularity | int | None = None,
        truncation: Truncation = Truncation.NONE,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score token sequences. Arguments and errors as for `RewardClient.score`."""
        options = ScoreOptions(truncation, references, process, priority, request_id)
        job = calls.token_job(sequences, prompt_lengths, prompts, options, self.pin)
        return await self._driver.run(calls.score(self._core, job, timeout_s))

    async def score_texts(
        self,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] = (),
        references: Sequence[str] = (),
        process: Granularity | None = None,
        truncation: Truncation = Truncation.NONE,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score texts. Arguments and errors as for `RewardClient.score_texts`."""
        options = ScoreOptions(truncation, references, process, priority, request_id)
        job = calls.text_job(texts, prompts, options, self.pin)
        return await self._driver.run(calls.score(self._core, job, timeout_s))

    async def score_conversations(
        self,
        conversations: Sequence[Sequence[ChatTurn]],
        *,
        references: Sequence[str] = (),
        process: Granularity | None = None,
        truncation: Truncation = Truncation.NONE,
        priority: Priority = Priority.NORMAL,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score conversations. Arguments and errors as for `RewardClient.score_conversations`."""
        options = ScoreOptions(truncation, references, process, priority, request_id)
        job = calls.conversation_job(conversations, options, self.pin)
        return await self._driver.run(calls.score(self._core, job, timeout_s))

    async def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        return await self._driver.run(calls.describe(self._core, timeout_s))

    async def list_rewards(self, *, timeout_s: float | None = None) -> tuple[RewardDescription, ...]:
        """Ask for every reward of the service, the default first."""
        return await self._driver.run(calls.list_rewards(self._core, timeout_s))
