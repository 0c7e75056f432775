"""Rewards that models of this process compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ppod.errors import InvalidArgument
from ppod.tensors import FloatArray, TokenArray
from ppod_services.core.callers import Caller
from ppod_services.reward.kinds import HeadConfig, SequenceClassificationConfig, TokenClassificationConfig
from ppod_services.reward.model_inputs import (
    Reader,
    at_end,
    check_ids,
    encode_steps,
    encode_whole,
    truncate,
    truncate_reads,
)
from ppod_services.reward.requests import ModelInput
from ppod_services.reward.runtime import Runtime, holds_tokens_of
from ppod_services.reward.samples import (
    Granularity,
    Query,
    Sample,
    TokenContent,
    split_by_steps,
    with_prefixes,
)
from ppod_services.reward.scored import Adjustment, Kind, RawScores, Scored, Work, adjusted
from ppod_services.reward.served import ServedModel
from ppod_services.reward.steps import step_positions


class Reward(Protocol):
    """A named reward that scores requests."""

    async def score(self, query: Query) -> Scored:
        """Scores of all sequences, and of the way where the query asks for it.

        Raises:
            PpodError: any class of `ppod.errors`; never a made-up score.
        """
        ...


class SequenceReward:
    """A model with one score for a sequence. The score of the way at a position is that of the sequence up to it."""

    def __init__(self, config: HeadConfig | SequenceClassificationConfig, model: ServedModel, runtime: Runtime) -> None:
        self._name = config.name
        self._special_tokens = isinstance(config, SequenceClassificationConfig)
        self._adjustment = Adjustment.of(config)
        self._model = model
        self._runtime = runtime

    async def score(self, query: Query) -> Scored:
        """See `Reward`."""
        if query.steps is not None and self._reads_all_at_once(query):
            return await self._score_at_once(query, query.steps.positions)
        samples = with_prefixes(query.samples, query.steps)
        reader = self._reader(query)
        sequences = await self._encode(samples, reader, query.caller)
        cut = truncate(samples, sequences, query, reader, self._model.info.max_sequence_tokens)
        scorer = self._model.scorer
        inputs = [at_end(tokens, scorer.end_of(tokens)) for tokens in cut]
        values, work = await self._runtime.run_model(self._model, inputs, query)
        scores, way = split_by_steps(np.concatenate(values), query.steps)
        lost = np.asarray([len(whole) - len(tokens) for whole, tokens in zip(sequences, cut, strict=True)])
        lost_whole = lost if query.steps is None else lost[np.cumsum([len(p) for p in query.steps.positions]) - 1]
        return self._scored(query, RawScores(scores, way), work, lost_whole)

    def _reads_all_at_once(self, query: Query) -> bool:
        """Whether one forward gives the scores of all prefixes: nothing is cut, and token ids stay what they are."""
        most = self._model.info.max_sequence_tokens
        return self._model.scorer.scores_prefixes and all(
            isinstance(sample.content, TokenContent)
            and holds_tokens_of(sample, query, self._model)
            and len(sample.content.tokens) <= most
            for sample in query.samples
        )

    async def _score_at_once(self, query: Query, positions: Sequence[Sequence[int]]) -> Scored:
        scorer = self._model.scorer
        sequences = await self._encode(query.samples, self._reader(query), query.caller)
        inputs = [
            ModelInput(tokens, np.asarray([scorer.end_of(tokens[:end]) for end in ends], dtype=np.int32))
            for tokens, ends in zip(sequences, positions, strict=True)
        ]
        values, work = await self._runtime.run_model(self._model, inputs, query)
        scores = np.asarray([way[-1] for way in values], dtype=np.float32)
        return self._scored(query, RawScores(scores, tuple(values)), work, np.zeros(len(values), dtype=np.int64))

    def _reader(self, query: Query) -> Reader:
        return reader_of(self._name, self._model, query, special_tokens=self._special_tokens)

    async def _encode(self, samples: Sequence[Sample], reader: Reader, caller: Caller) -> list[TokenArray]:
        if all(isinstance(sample.content, TokenContent) for sample in samples) and reader.same_tokens:
            return encode_whole(samples, reader)
        return await self._runtime.tokenize(samples, caller, lambda: encode_whole(samples, reader))

    def _scored(self, query: Query, raw: RawScores, work: Work, lost: npt.NDArray[np.integer]) -> Scored:
        return scored_by_model(query, raw, self._adjustment, self._model, Kind.MODEL, work, lost.tolist())


class ProcessReward:
    """A process reward model: probabilities of steps, of which one score for the sequence is made."""

    def __init__(self, config: TokenClassificationConfig, model: ServedModel, runtime: Runtime) -> None:
        self._config = config
        self._adjustment = Adjustment.of(config)
        self._model = model
        self._runtime = runtime

    async def score(self, query: Query) -> Scored:
        """See `Reward`. The way is the probability of each step; with granularity TOKEN, of each token as it stands."""
        reader = reader_of(self._config.name, self._model, query, special_tokens=False)
        prepared = await self._runtime.tokenize(query.samples, query.caller, lambda: self._prepare(query, reader))
        values, work = await self._runtime.run_model(self._model, [one for one, _ in prepared], query)
        count = len(query.samples)
        scores = np.asarray([_REDUCTIONS[self._config.reduce](steps) for steps in values[:count]], dtype=np.float32)
        way = None
        if query.steps is not None:
            # Where the asker's steps are the model's own, one forward did for both.
            way = tuple(values[count:]) if len(values) > count else tuple(values)
        lost = [dropped for _, dropped in prepared[:count]]
        raw = RawScores(scores, way)
        return scored_by_model(query, raw, self._adjustment, self._model, Kind.PROCESS_MODEL, work, lost)

    def _prepare(self, query: Query, reader: Reader) -> list[tuple[ModelInput, int]]:
        """Inputs for the scores, then those for the way unless they are the same."""
        separator = self._config.steps.separator
        source = reader.source
        own = tuple(step_positions(sample, separator, source) for sample in query.samples)
        inputs = [
            encode_steps(sample, ends, separator, reader) for sample, ends in zip(query.samples, own, strict=True)
        ]
        asked = list(query.samples)
        if query.steps is not None and query.steps.granularity is Granularity.TOKEN:
            pairs = zip(query.samples, query.steps.positions, strict=True)
            inputs += [self._tokens(sample, ends, reader) for sample, ends in pairs]
            asked += query.samples
        elif query.steps is not None and query.steps.positions != own:
            pairs = zip(query.samples, query.steps.positions, strict=True)
            inputs += [encode_steps(sample, ends, separator, reader) for sample, ends in pairs]
            asked += query.samples
        most = self._model.info.max_sequence_tokens
        side = query.truncation
        return [truncate_reads(sample, one, side, most) for sample, one in zip(asked, inputs, strict=True)]

    def _tokens(self, sample: Sample, ends: Sequence[int], reader: Reader) -> ModelInput:
        if not isinstance(sample.content, TokenContent) or not reader.same_tokens:
            expected = f"token ids of the tokenizer of {self._config.name!r}, or granularity STEP"
            # Of the whole request: without this sample it would be no better.
            raise InvalidArgument("process", "PROCESS_GRANULARITY_TOKEN", expected)
        check_ids([sample], [sample.content.tokens], reader)
        return ModelInput(sample.content.tokens, np.asarray(ends, dtype=np.int32) - 1)


_REDUCTIONS: dict[str, Callable[[FloatArray], np.floating]] = {
    "min": lambda steps: steps.min(),
    "product": lambda steps: steps.astype(np.float64).prod(),
    "last": lambda steps: steps[-1],
    "mean": lambda steps: steps.astype(np.float64).mean(),
}


def reader_of(name: str, model: ServedModel, query: Query, *, special_tokens: bool) -> Reader:
    """How a model reads a query."""
    same = query.source is None or query.source.codec.fingerprint == model.info.tokenizer_fingerprint
    source = None if query.source is None else query.source.codec
    return Reader(name, model.codec, model.info.vocab_size, special_tokens, same, source)


def scored_by_model(
    query: Query,
    raw: RawScores,
    adjustment: Adjustment | None,
    model: ServedModel,
    kind: Kind,
    work: Work,
    lost: list[int],
) -> Scored:
    """Adjust what a model computed, and say which model it was."""
    name = model.info.name
    done = adjusted(raw, adjustment, [sample.index for sample in query.samples], name)
    return Scored(
        name=name,
        kind=kind,
        scores=done.scores,
        raw=None if adjustment is None else raw.scores,
        adjustment=adjustment,
        way=done.way,
        model=model.identity,
        truncated=tuple(lost) if any(lost) else (),
        work=work,
    )
