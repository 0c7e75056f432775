"""The transformers engine driven in this process: no gRPC, no queue, no event loop.

usage: python -m benchmarks.generation.transformers_engine CONFIGURATION

Answers each line of its input, {"workload": NAME, "joins": BOOL}, with one line: seconds, and the tokens of each
completion. Without joins a batch runs to its end before the next one begins.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.generation.workloads import BATCH, Wanted, workloads
from ppod.errors import PpodError
from ppod_models.configuration import ModelConfig
from ppod_services.core.model import load_causal_model
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.engine import GenerationEngine
from ppod_services.generation.requests import GeneratedSample, GenerationItem, TokenFilter


class Feed:
    """Takes completions, and lets those that wait join where there is room."""

    def __init__(self, items: Sequence[GenerationItem], *, joins: bool) -> None:
        self._waiting = list(items)
        self._joins = joins
        self._active = 0
        self._given = 0
        self.tokens: dict[int, list[int]] = {}
        self.steps = 0
        self.base = 0

    def batch(self) -> list[GenerationItem]:
        """Who begins; empty at the end."""
        self.base = self._given
        return self._take(BATCH)

    def emit(self, position: int, result: GeneratedSample) -> None:
        self.tokens[self.base + position] = result.tokens.tolist()
        self._active -= 1

    def fail(self, position: int, error: PpodError) -> None:  # noqa: ARG002 - a sink's signature
        raise error

    def abandoned(self, position: int) -> bool:  # noqa: ARG002 - a sink's signature
        return False

    def more(self) -> list[GenerationItem]:
        return self._take(BATCH - self._active) if self._joins and self._active else []

    def between_steps(self) -> bool:
        self.steps += 1
        return False

    def _take(self, count: int) -> list[GenerationItem]:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._active += len(taken)
        self._given += len(taken)
        return taken


def as_item(index: int, one: Wanted) -> GenerationItem:
    """As the service reads it from a request."""
    return GenerationItem(
        prompt_index=index,
        sample=0,
        prompt=np.asarray(one.prompt, dtype=np.int32),
        seed=one.seed,
        max_tokens=one.max_tokens,
        token_filter=TokenFilter(temperature=1.0),
        stop_ids=frozenset(),
    )


def main() -> None:
    """Answer until the input ends."""
    model = load_causal_model(ModelConfig.model_validate(json.loads(sys.argv[1])["model"]), "policy", 2**24)
    weights = ServedWeights(ModelWeights(model.model), lambda _: None)
    engine = GenerationEngine(model, weights, model.tokenizer)
    known = workloads()
    for line in sys.stdin:
        asked = json.loads(line)
        wanted = known[asked["workload"]].wanted
        feed = Feed([as_item(index, one) for index, one in enumerate(wanted)], joins=asked["joins"])
        begin = time.perf_counter()
        while batch := feed.batch():
            engine.run(batch, feed)
        seconds = time.perf_counter() - begin
        tokens = [feed.tokens[index] for index in range(len(wanted))]
        print(json.dumps({"seconds": seconds, "steps": feed.steps, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
