"""What rewards share at run time: the models' queue, and a thread that tokenises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from ppod.errors import DeadlineExceeded
from ppod.tensors import FloatArray
from ppod_services.core.callers import Caller
from ppod_services.core.scheduler import Outcome, Scheduler, Submission
from ppod_services.reward.backlog import Turns
from ppod_services.reward.requests import ModelInput, RewardItem
from ppod_services.reward.samples import ChatContent, PlainText, Query, Sample, TextContent, TokenContent, read_turns
from ppod_services.reward.scored import Work
from ppod_services.reward.served import ServedModel

JobT = TypeVar("JobT")

_CHARACTERS_OF_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Runtime:
    """The models' queue, and an executor with a single thread for tokenisers and templates.

    Tokenising a long text takes seconds, and comes before queue and quotas: the thread goes to the teams in turn.
    """

    scheduler: Scheduler[RewardItem, FloatArray]
    tokenizing: Executor
    turns: Turns = field(default_factory=lambda: Turns(1))

    async def tokenize(self, samples: Sequence[Sample], caller: Caller, job: Callable[[], JobT]) -> JobT:
        """Run what encodes, decodes or renders these samples, off the event loop, when it is the caller's turn."""
        async with self.turns.place(caller, sum(_size_of(sample) for sample in samples)):
            return await asyncio.get_running_loop().run_in_executor(self.tokenizing, job)

    async def texts(self, samples: Sequence[Sample], query: Query) -> list[PlainText]:
        """Samples as text; raises InvalidArgument as `read_turns` does."""
        codec = None if query.source is None else query.source.codec
        if all(isinstance(sample.content, TextContent) for sample in samples):
            return [read_turns(sample, codec) for sample in samples]
        return await self.tokenize(samples, query.caller, lambda: [read_turns(sample, codec) for sample in samples])

    async def run_model(
        self, model: ServedModel, inputs: Sequence[ModelInput], query: Query
    ) -> tuple[list[FloatArray], Work]:
        """Put inputs into the models' queue together and wait for all; leaving early takes them out again.

        With those of all other models that the query asks: they enter together or not at all.
        """
        group = (model.info.name, model.weight_version)
        packed = model.info.packs
        scorer = model.scorer
        submissions = [Submission(RewardItem(scorer, one), scorer.tokens_of(one), group, packed) for one in inputs]

        async def submit(all_of_them: Sequence[Submission[RewardItem]]) -> list[Outcome[FloatArray]]:
            ticket = self.scheduler.submit(all_of_them, seconds_left(query), query.caller)
            try:
                return await ticket.gather()
            finally:
                ticket.cancel()

        meeting = query.rendezvous
        outcomes = await (submit(submissions) if meeting is None else meeting.run(submissions, submit))
        return [outcome.result for outcome in outcomes], _work_of(outcomes, sum(one.tokens for one in submissions))


def seconds_left(query: Query) -> float:
    """Seconds until a query is worth nothing; raise DeadlineExceeded when that was."""
    left = query.deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("no result within the deadline")
    return left


async def within(query: Query, work: Callable[[], Awaitable[JobT]]) -> JobT:
    """Do work until the query's deadline; raise DeadlineExceeded, with the work cancelled, when that passes."""
    try:
        async with asyncio.timeout(seconds_left(query)):
            return await work()
    except TimeoutError:
        raise DeadlineExceeded("no result within the deadline") from None


def holds_tokens_of(sample: Sample, query: Query, model: ServedModel) -> bool:
    """Whether a sample is token ids that the model may read as they are."""
    if not isinstance(sample.content, TokenContent):
        return False
    return query.source is None or query.source.codec.fingerprint == model.info.tokenizer_fingerprint


def _size_of(sample: Sample) -> int:
    """About as many tokens as a sample has; only for fairness."""
    match sample.content:
        case TokenContent(tokens, _):
            return len(tokens)
        case TextContent(prompt, response):
            characters = len(prompt) + len(response)
        case ChatContent(turns):
            characters = sum(len(turn.content) for turn in turns)
    return 1 + characters // _CHARACTERS_OF_A_TOKEN


def _work_of(outcomes: Sequence[Outcome[FloatArray]], tokens: int) -> Work:
    seconds: dict[int, float] = {}
    for outcome in outcomes:
        seconds[outcome.batch] = max(outcome.compute_s, seconds.get(outcome.batch, 0.0))
    queue_s = min(outcome.queue_s for outcome in outcomes)
    return Work(queue_s, seconds, tokens)
