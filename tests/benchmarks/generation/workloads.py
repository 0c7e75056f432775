"""What is generated: prompts of movie reviews, and how long their completions get."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from benchmarks.subject import SMOLLM2
from ppod_models.sources import resolve
from support.processes import ROOT

REVIEWS = ROOT / "trainer/ppod_trainer/data/movie_review_ratings.tsv"
BATCH = 32
"""Most sequences that decode together, in every run."""


@dataclass(frozen=True)
class Wanted:
    """One completion: it gets exactly `max_tokens`, because no token ends it."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Workload:
    """Completions that are asked for at once.

    Attributes:
        name: for tables.
        requests: completions of one request each; one request takes one `max_tokens`.
    """

    name: str
    requests: Sequence[Sequence[Wanted]]

    @property
    def wanted(self) -> list[Wanted]:
        return [one for request in self.requests for one in request]

    @property
    def tokens(self) -> int:
        """New tokens."""
        return sum(one.max_tokens for one in self.wanted)

    @property
    def static_steps(self) -> int:
        """Steps of batches that nobody joins, each as long as its longest completion."""
        lengths = [one.max_tokens for one in self.wanted]
        return sum(max(lengths[start : start + BATCH]) for start in range(0, len(lengths), BATCH))


@functools.cache
def workloads() -> dict[str, Workload]:
    """By name."""
    tokenizer = Tokenizer.from_file(str(resolve(SMOLLM2).path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    texts = [line.split("\t")[3] for line in REVIEWS.read_text(encoding="utf-8").splitlines()[1:]]
    chosen = iter([texts[index] for index in rng.permutation(len(texts))])

    def wanted(count: int, length: Callable[[], int], most: Callable[[], int]) -> list[Wanted]:
        made: list[Wanted] = []
        for seed in range(count):
            ids: list[int] = []
            wanted_length = length()
            while len(ids) < wanted_length:
                ids += tokenizer.encode(next(chosen) + "\n").ids
            made.append(Wanted(tuple(ids[:wanted_length]), most(), seed))
        return made

    def short() -> int:
        return int(rng.integers(6, 21))

    mixed = wanted(96, lambda: int(rng.choice([8, 16, 32, 64, 128])), lambda: int(rng.integers(16, 257)))
    made = [
        Workload("32 x 24 tokens, one request", [wanted(32, short, lambda: 24)]),
        Workload("32 x 128 tokens, one request", [wanted(32, short, lambda: 128)]),
        Workload("96 x 16 to 256 tokens, 96 requests", [[one] for one in mixed]),
    ]
    return {workload.name: workload for workload in made}
