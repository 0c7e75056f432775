"""Results never depend on who shared the batch, beyond floating-point noise.

The bound: two scores of one sequence, alone and in any company, differ by at most

    float32   1e-5
    bfloat16  0.1

in units of the scores' standard deviation over the sequences, packed as padded. The batch's shape changes the order in
which a
matrix product adds up, which moves each state by some units in the last place (2^-24 and 2^-9 of its size); the layers
above amplify that about tenfold. A fault, such as a state that is read at a padded position, moves scores by about
their standard deviation, and by as much in either type.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ppod.tensors import FloatArray, TokenArray
from ppod_models.configuration import ModelConfig
from ppod_services.core.callers import Caller, Team
from ppod_services.core.config import BatchingConfig
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.scheduler import Scheduler, Submission
from ppod_services.reward.kinds import HeadConfig
from ppod_services.reward.loading import load_all
from ppod_services.reward.model_inputs import at_end
from ppod_services.reward.requests import RewardItem, run_batch
from ppod_services.reward.served import ServedModel

LONG_S = 300.0
BOUNDS = {"float32": 1e-5, "bfloat16": 0.1}
LENGTHS = (1, 2, 3, 7, 16, 17, 31, 40, 64, 100)


def load(directory: Path, head: Path, dtype: str, attention: str) -> ServedModel:
    model = ModelConfig(source=str(directory), device="cpu", dtype=dtype, attention=attention, threads=1)  # pyright: ignore
    [served] = load_all([HeadConfig(name="model", model=model, head=str(head))], 1024)
    return served


def submission(model: ServedModel, tokens: TokenArray) -> Submission[RewardItem]:
    item = RewardItem(model.scorer, at_end(tokens, model.scorer.end_of(tokens)))
    return Submission(item, len(tokens), "model", model.info.packs)


async def score(model: ServedModel, requests: Sequence[Sequence[TokenArray]], batching: BatchingConfig) -> FloatArray:
    """Scores of all sequences of all requests, each of another team, which enter the queue together."""
    with ThreadPoolExecutor(1) as executor:
        scheduler: Scheduler[RewardItem, FloatArray] = Scheduler(run_batch, batching, executor, ServiceMetrics())
        tickets = [
            scheduler.submit(
                [submission(model, tokens) for tokens in request], LONG_S, Caller(Team(f"team-{number % 3}"))
            )
            for number, request in enumerate(requests)
        ]
        running = asyncio.create_task(scheduler.run())
        try:
            outcomes = [await ticket.gather() for ticket in tickets]
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
    return np.concatenate([outcome.result for request in outcomes for outcome in request])


@pytest.mark.parametrize(("attention", "packs"), [("sdpa", True), ("eager", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_scores_do_not_depend_on_the_company(
    tiny_model_dir: Path, tiny_heads: dict[str, Path], dtype: str, attention: str, packs: bool
) -> None:
    model = load(tiny_model_dir, tiny_heads["first"], dtype, attention)
    assert model.info.packs is packs
    rng = np.random.default_rng(7)
    sequences: list[TokenArray] = [rng.integers(0, 256, length, dtype=np.int32) for length in LENGTHS * 4]
    one_by_one = BatchingConfig(max_batch_size=1)
    alone = await score(model, [[tokens] for tokens in sequences], one_by_one)
    spread = float(alone.std())
    assert spread > 0.1
    order = rng.permutation(len(sequences))
    companies = [
        # Wide padding, narrow padding, and requests of many lengths cut by a small budget.
        BatchingConfig(max_batch_tokens=16_384, shared_batch_tokens=16_384, batch_overhead_tokens=16_384),
        BatchingConfig(max_batch_tokens=1_024, batch_overhead_tokens=0),
        BatchingConfig(max_batch_tokens=300, shared_batch_tokens=128, max_batch_size=5),
    ]
    for batching in companies:
        requests = [[sequences[index] for index in part] for part in np.array_split(order, 7)]
        together = np.empty_like(alone)
        together[order] = await score(model, requests, batching)
        assert np.abs(together - alone).max() / spread <= BOUNDS[dtype]


async def test_a_caller_who_is_alone_gets_the_same_bits_each_time(
    tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    model = load(tiny_model_dir, tiny_heads["first"], "float32", "sdpa")
    rng = np.random.default_rng(8)
    request = [rng.integers(0, 256, length, dtype=np.int32) for length in LENGTHS * 3]
    batching = BatchingConfig(max_batch_tokens=300, max_batch_size=6)
    first, second = [await score(model, [request], batching) for _ in range(2)]
    assert first.tobytes() == second.tobytes()
