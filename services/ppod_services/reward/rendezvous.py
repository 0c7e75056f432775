"""Where the models that one request asks for meet before they enter the queue. Free of torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from ppod.errors import Cancelled, PpodError
from ppod_services.core.tickets import Outcome, Submission

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Rendezvous(Generic[ItemT, ResultT]):
    """Lets the sequences of several models enter the queue together, or not at all.

    One after the other, the first would spend the quota that the next one lacks, and again each time that the request
    is repeated: near its quota a team would pay for what it never gets.

    Args:
        parties: how many come; each must, once.
    """

    def __init__(self, parties: int) -> None:
        self._missing = parties
        self._submissions: list[Submission[ItemT]] = []
        self._done = asyncio.Event()
        self._outcomes: list[Outcome[ResultT]] = []
        self._error: PpodError = Cancelled("the request was cancelled before it was scored")

    async def run(
        self,
        submissions: Sequence[Submission[ItemT]],
        submit: Callable[[Sequence[Submission[ItemT]]], Awaitable[list[Outcome[ResultT]]]],
    ) -> list[Outcome[ResultT]]:
        """Bring what one party has, and wait for its outcomes; they keep its order.

        Args:
            submissions: the party's.
            submit: runs what all parties brought; that of the last one is called.

        Raises:
            PpodError: what `submit` raised, to all parties.
        """
        start = len(self._submissions)
        self._submissions += submissions
        self._missing -= 1
        if self._missing:
            await self._done.wait()
        else:
            await self._submit(submit)
        if not self._outcomes:
            raise self._error
        return self._outcomes[start : start + len(submissions)]

    async def _submit(self, submit: Callable[[Sequence[Submission[ItemT]]], Awaitable[list[Outcome[ResultT]]]]) -> None:
        try:
            self._outcomes = await submit(self._submissions)
        except PpodError as error:
            self._error = error
        finally:
            self._done.set()
