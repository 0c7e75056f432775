"""Rewards of models in this process, on one whose scores are arithmetic: what it is given, what is made of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest

from ppod.errors import InvalidArgument
from ppod.tensors import FloatArray, TokenArray
from ppod_models.configuration import ModelConfig
from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.core.config import BatchingConfig
from ppod_services.core.described import ModelInfo
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.scheduler import Scheduler
from ppod_services.reward.codec import TokenizerCodec
from ppod_services.reward.kinds import SequenceClassificationConfig, TokenClassificationConfig
from ppod_services.reward.model_rewards import ProcessReward, SequenceReward
from ppod_services.reward.requests import ModelInput, RewardItem, run_batch
from ppod_services.reward.runtime import Runtime
from ppod_services.reward.samples import (
    Content,
    Granularity,
    Query,
    Sample,
    Steps,
    TextContent,
    TokenContent,
    TokenSource,
    Truncation,
)
from ppod_services.reward.served import ServedModel
from support.tiny_model import build_tokenizer

Reduce = Literal["min", "product", "last", "mean"]


@dataclass
class Arithmetic:
    """The value read at a position is the sum of the ids up to it, or what `values` has for that position."""

    values: Mapping[int, float] = field(default_factory=dict[int, float])
    scores_prefixes: bool = False
    seen: list[list[int]] = field(default_factory=list[list[int]])

    def end_of(self, tokens: TokenArray) -> int:
        return len(tokens) - 1

    def tokens_of(self, one: ModelInput) -> int:
        return len(one.tokens)

    def score(self, inputs: Sequence[ModelInput]) -> Sequence[FloatArray]:
        self.seen += [one.tokens.tolist() for one in inputs]
        return [np.asarray([self._value(one, end) for end in one.reads.tolist()], np.float32) for one in inputs]

    def _value(self, one: ModelInput, end: int) -> float:
        return self.values.get(end, float(one.tokens[: end + 1].sum()))


def serving(
    scorer: Arithmetic, config: SequenceClassificationConfig | TokenClassificationConfig, most: int
) -> ServedModel:
    codec = TokenizerCodec(build_tokenizer())
    return ServedModel(config, ModelInfo(config.name, codec.fingerprint, 320, most, "float32", "cpu"), 0, scorer, codec)


def sequence_reward(scorer: Arithmetic, most: int, runtime: Runtime) -> SequenceReward:
    config = SequenceClassificationConfig(
        name="whole", kind="sequence_classification", model=ModelConfig(source="none")
    )
    return SequenceReward(config, serving(scorer, config, most), runtime)


def process_reward(scorer: Arithmetic, most: int, runtime: Runtime, reduce: Reduce = "min") -> ProcessReward:
    model = ModelConfig(source="none")
    config = TokenClassificationConfig(name="steps", kind="token_classification", model=model, reduce=reduce)
    return ProcessReward(config, serving(scorer, config, most), runtime)


def query(*contents: Content, truncation: Truncation = Truncation.NONE) -> Query:
    samples = tuple(Sample(index, content) for index, content in enumerate(contents))
    return Query(samples, truncation, ANONYMOUS_CALLER, time.monotonic() + 30)


def tokens(*ids: int, prompt: int = 0) -> TokenContent:
    return TokenContent(np.asarray(ids, np.int32), prompt)


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    config = BatchingConfig(max_batch_tokens=1_000, max_wait_ms=0)
    with ThreadPoolExecutor(1) as model, ThreadPoolExecutor(1) as tokenizing:
        scheduler: Scheduler[RewardItem, FloatArray] = Scheduler(run_batch, config, model, ServiceMetrics())
        running = asyncio.create_task(scheduler.run())
        yield Runtime(scheduler, tokenizing)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@pytest.mark.parametrize(("reduce", "score"), [("min", 0.25), ("product", 0.09375), ("last", 0.75), ("mean", 0.5)])
async def test_the_score_of_steps_is_what_was_configured(runtime: Runtime, reduce: Reduce, score: float) -> None:
    reward = process_reward(Arithmetic({2: 0.5, 5: 0.25, 8: 0.75}), 9, runtime, reduce)
    scored = await reward.score(query(TextContent("", "aa\nbb\ncc")))
    assert (scored.scores.tolist(), scored.way, scored.truncated) == ([score], None, ())


@pytest.mark.parametrize("most", [8, 7])
async def test_a_process_model_reads_every_step_of_what_was_cut_before_them(runtime: Runtime, most: int) -> None:
    lost = 9 - most
    scorer = Arithmetic({2 - lost: 0.5, 5 - lost: 0.25, 8 - lost: 0.75})
    asked = query(TextContent("", "c"), TextContent("", "aa\nbb\ncc"), truncation=Truncation.LEFT)
    asked = replace(asked, steps=Steps(Granularity.STEP, ((1,), (3, 6, 8))))
    scored = await process_reward(scorer, most, runtime).score(asked)
    whole = build_tokenizer()("aa\nbb\ncc\n")["input_ids"]
    assert whole[lost:] in scorer.seen
    # One forward for the score and for the way: its own steps are what was asked for.
    assert (scored.scores.tolist()[1], scored.truncated, scored.work.tokens) == (0.25, (0, lost), 2 + most)
    assert scored.way is not None
    assert scored.way[1].tolist() == [0.5, 0.25, 0.75]


@pytest.mark.parametrize("side", list(Truncation))
async def test_a_process_model_s_input_is_never_cut_through_the_end_of_a_step(
    runtime: Runtime, side: Truncation
) -> None:
    most = 6 if side is Truncation.LEFT else 8
    with pytest.raises(InvalidArgument) as caught:
        await process_reward(Arithmetic(), most, runtime).score(
            query(TextContent("", "c"), TextContent("", "aa\nbb\ncc"), truncation=side)
        )
    expected = f"at most {most} tokens, or TRUNCATION_SIDE_LEFT and fewer to cut than stand before the first step's end"
    assert vars(caught.value) == vars(InvalidArgument("texts.texts", "9 tokens", expected, 1))


@pytest.mark.parametrize(
    ("side", "read", "scores"),
    [
        (Truncation.LEFT, [[7, 8, 9, 1], [1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]], [6.0, 10.0, 14.0]),
        (Truncation.RIGHT, [[7, 8, 9, 1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]], [6.0, 10.0, 10.0]),
    ],
)
async def test_what_is_cut_along_the_way_is_told_of_the_whole_sequence(
    runtime: Runtime, side: Truncation, read: list[list[int]], scores: list[float]
) -> None:
    scorer = Arithmetic(scores_prefixes=True)
    asked = query(tokens(7, 8, 9, 1, prompt=3), tokens(1, 2, 3, 4, 5, prompt=2), truncation=side)
    asked = replace(asked, steps=Steps(Granularity.TOKEN, ((4,), (3, 4, 5))))
    scored = await sequence_reward(scorer, 4, runtime).score(asked)
    assert sorted(scorer.seen) == sorted(read)
    assert scored.way is not None
    assert ([one.tolist() for one in scored.way], scored.scores.tolist()) == ([[25.0], scores], [25.0, scores[-1]])
    assert (scored.truncated, scored.work.tokens) == ((0, 1), 15)
    with pytest.raises(InvalidArgument) as caught:
        await sequence_reward(scorer, 4, runtime).score(replace(asked, truncation=Truncation.NONE))
    assert (caught.value.field, caught.value.sample) == ("tokens.lengths", 1)


async def test_a_process_model_s_tokens_are_read_as_they_stand(runtime: Runtime) -> None:
    scorer = Arithmetic()
    reward = process_reward(scorer, 9, runtime)
    codec = TokenizerCodec(build_tokenizer())
    [ids] = codec.encode(["ab\nc"], special_tokens=False)
    [newline] = codec.encode(["\n"], special_tokens=False)[0].tolist()
    asked = replace(query(TokenContent(ids, 1)), source=TokenSource(codec, 320))
    asked = replace(asked, steps=Steps(Granularity.TOKEN, ((2, 4),)))
    scored = await reward.score(asked)
    a, b, _, c = ids.tolist()
    assert scorer.seen == [[a, b, newline, c, newline], [a, b, newline, c]]
    assert scored.way is not None
    assert (scored.scores.tolist(), scored.way[0].tolist()) == ([a + b + newline], [a + b, a + b + newline + c])


@pytest.mark.parametrize(
    ("scores_prefixes", "known", "read"),
    [
        (True, True, [[1, 2, 3, 4]]),
        (False, True, [[1, 2], [1, 2, 3], [1, 2, 3, 4]]),
        # Its positions are those of other ids.
        (True, False, [[1, 2], [1, 2, 3], [1, 2, 3, 4]]),
    ],
)
async def test_one_forward_reads_the_whole_way_only_where_its_positions_are_those_asked_for(
    runtime: Runtime, scores_prefixes: bool, known: bool, read: list[list[int]]
) -> None:
    tokenizer = build_tokenizer()
    if not known:
        tokenizer.add_tokens(["<more>"])
    scorer = Arithmetic(scores_prefixes=scores_prefixes)
    asked = replace(query(tokens(1, 2, 3, 4, prompt=1)), source=TokenSource(TokenizerCodec(tokenizer), 320))
    asked = replace(asked, steps=Steps(Granularity.TOKEN, ((2, 3, 4),)))
    scored = await sequence_reward(scorer, 4, runtime).score(asked)
    assert sorted(scorer.seen) == read
    assert scored.way is not None
    assert (scored.scores.tolist(), scored.way[0].tolist(), scored.truncated) == ([10.0], [3.0, 6.0, 10.0], ())
