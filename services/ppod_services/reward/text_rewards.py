"""Rewards that read text and run beside the models: functions and judges."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ppod.errors import InvalidArgument
from ppod_services.reward.functions import FunctionSample
from ppod_services.reward.functions.pool import FunctionPool, NumberedSample
from ppod_services.reward.kinds import FunctionConfig, JudgeConfig
from ppod_services.reward.runtime import Runtime, within
from ppod_services.reward.samples import PlainText, Query, Sample, split_by_steps, with_prefixes
from ppod_services.reward.scored import Adjustment, Kind, RawScores, Scored, Work, adjusted, as_scores


class TextScorer(Protocol):
    """Scores texts, each with the position in its request; see `FunctionPool` and `Judge`."""

    async def score(self, samples: Sequence[Sample], texts: Sequence[PlainText], query: Query, /) -> list[float]:
        """One value a text, perhaps not finite; the query tells who asks, and until when."""
        ...


class FunctionScorer:
    """A function's processes as a scorer of texts."""

    def __init__(self, pool: FunctionPool, needs_references: bool) -> None:
        self._pool = pool
        self._needs_references = needs_references

    async def score(self, samples: Sequence[Sample], texts: Sequence[PlainText], query: Query, /) -> list[float]:
        """Values as the function returned them."""
        numbered = [
            NumberedSample(sample.index, FunctionSample(text.prompt, text.response, self._reference(sample)))
            for sample, text in zip(samples, texts, strict=True)
        ]
        return await self._pool.score(numbered, query.caller)

    def _reference(self, sample: Sample) -> str | None:
        if sample.reference is None and self._needs_references:
            raise InvalidArgument("references", "none", "one for each sequence: this reward compares with them")
        return sample.reference


class TextReward:
    """A reward that reads text. The score of the way at a position is that of the text up to it."""

    def __init__(self, config: FunctionConfig | JudgeConfig, kind: Kind, scorer: TextScorer, runtime: Runtime) -> None:
        self._name = config.name
        self._kind = kind
        self._adjustment = Adjustment.of(config)
        self._scorer = scorer
        self._runtime = runtime

    async def score(self, query: Query) -> Scored:
        """See `model_rewards.Reward`."""
        start = time.monotonic()
        samples = with_prefixes(query.samples, query.steps)
        texts = await self._runtime.texts(samples, query)
        values = await within(query, lambda: self._scorer.score(samples, texts, query))
        scores, way = split_by_steps(as_scores(values), query.steps)
        raw = RawScores(scores, way)
        done = adjusted(raw, self._adjustment, [sample.index for sample in query.samples], self._name)
        return Scored(
            name=self._name,
            kind=self._kind,
            scores=done.scores,
            raw=None if self._adjustment is None else raw.scores,
            adjustment=self._adjustment,
            way=done.way,
            work=Work(elsewhere_s=time.monotonic() - start),
        )
