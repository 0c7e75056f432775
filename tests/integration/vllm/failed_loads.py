"""A service's engine and weights without the service: loads that fail in a worker. `python -m ... MODEL_DIRECTORY`.

Prints one line of JSON, [version, tokens before, error, tokens after] for each attempt, and then waits to be killed.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from ppod.errors import Internal
from ppod_models.configuration import parse_config
from ppod_services.core.weight_store import ReceivedWeights
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.requests import GeneratedSample, GenerationItem, TokenFilter
from ppod_services.generation.vllm_backend.loading import load_vllm
from support.vllm_services import build_vllm_model, vllm_values


class _Results:
    def __init__(self) -> None:
        self.found: list[GeneratedSample] = []

    def emit(self, position: int, result: GeneratedSample) -> None:  # noqa: ARG002
        self.found.append(result)

    def fail(self, position: int, error: Exception) -> None:  # noqa: ARG002
        raise error

    def abandoned(self, position: int) -> bool:  # noqa: ARG002
        return False

    def more(self) -> list[GenerationItem]:
        return []

    def between_steps(self) -> bool:
        return False


def main(model_dir: str) -> None:
    """Run both attempts."""
    values = {**vllm_values(model_dir), "listen": {"port": 1}}
    config = parse_config(GenerationServiceConfig, values, "test")
    loaded = load_vllm(config, [].append)
    store = loaded.model.weights._store
    model = build_vllm_model(seed=9)
    good = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # All but the last tensor fit, so that the model is half new when the load fails.
    *fitting, last = good
    broken = {**{name: good[name] for name in fitting}, "model.nowhere.weight": good[last]}
    attempts: list[list[object]] = []
    for version in range(2):
        before = tokens(loaded.model.run_batch)
        try:
            store.stage(ReceivedWeights(7, broken))()
        except Internal as error:
            attempts.append([version, before, str(error), tokens(loaded.model.run_batch)])
        if version == 0:
            store.stage(ReceivedWeights(1, good))()
    sys.stdout.write(json.dumps({"attempts": attempts}) + "\n")
    sys.stdout.flush()
    time.sleep(300)


def tokens(run_batch: object) -> list[int]:
    """A greedy completion."""
    item = GenerationItem(
        prompt_index=0,
        sample=0,
        prompt=np.arange(60, 100, dtype=np.int32),
        seed=0,
        max_tokens=16,
        token_filter=TokenFilter(temperature=0.0),
        stop_ids=frozenset(),
    )
    results = _Results()
    run_batch([item], results)  # pyright: ignore
    return results.found[0].tokens.tolist()


if __name__ == "__main__":
    main(sys.argv[1])
