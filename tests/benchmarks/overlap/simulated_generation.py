"""A generation service whose engine works at a fixed speed: it sleeps for each step of a batch, and computes nothing.

All but the engine is the real service: queue, weights, wire. It stands for an engine on a device of its own.

usage: python -m benchmarks.overlap.simulated_generation --config FILE, with PPOD_SIMULATED_STEP_S in the environment
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppod_services.core.command import ServiceCommand
from ppod_services.core.scheduler import RunBatch, Sink
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, VersionSpan
from ppod_services.generation.service import GenerationService

if TYPE_CHECKING:
    from ppod_services.core.model import CausalModel
    from ppod_services.core.weights import ServedWeights


class SimulatedGeneration(GenerationService):
    """The generation service with an engine that sleeps."""

    def build_engine(self, model: CausalModel, weights: ServedWeights) -> RunBatch[GenerationItem, GeneratedSample]:
        """One sleep for each token of the longest completion, whatever the batch."""
        super().build_engine(model, weights)
        step_s = float(os.environ["PPOD_SIMULATED_STEP_S"])

        def run(items: Sequence[GenerationItem], sink: Sink[GeneratedSample]) -> None:
            time.sleep(step_s * max(item.max_tokens for item in items))
            for position, item in enumerate(items):
                sink.emit(position, _random_sample(item, model.info.vocab_size, weights.version))

        return run


def _random_sample(item: GenerationItem, vocab_size: int, version: int) -> GeneratedSample:
    """Tokens drawn evenly, with the logprobs of that."""
    tokens = np.random.default_rng(item.seed).integers(0, vocab_size, item.max_tokens, dtype=np.int32)
    logprobs = np.full(item.max_tokens, -np.log(vocab_size), dtype=np.float32)
    return GeneratedSample(tokens, logprobs, None, Ending.LENGTH, version, (VersionSpan(version, item.max_tokens),))


if __name__ == "__main__":
    ServiceCommand("generation", "Simulated.", GenerationServiceConfig, SimulatedGeneration).main()
