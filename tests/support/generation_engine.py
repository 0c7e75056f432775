"""The generation engine in this process, driven step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppod.errors import PpodError
from ppod_models.configuration import ModelConfig
from ppod_services.core.model import CausalModel, load_causal_model
from ppod_services.generation.decoder import SlotDecoder
from ppod_services.generation.engine import GenerationEngine
from ppod_services.generation.requests import GeneratedSample, GenerationItem, TokenFilter


@dataclass
class Versions:
    """As much of `ServedWeights` as an engine looks at."""

    version: int = 0


@dataclass
class StepSink:
    """A scheduler whose queue and pauses the test writes.

    Attributes:
        joining: items that join after the step of this number.
        pauses: called after the step of this number; returns whether the engine must hand back all.
        gone: positions whose caller has gone.
        samples: what was emitted.
        errors: what was failed.
        order: positions in the order in which they were answered.
    """

    joining: dict[int, list[GenerationItem]] = field(default_factory=dict[int, list[GenerationItem]])
    pauses: dict[int, Callable[[], bool]] = field(default_factory=dict[int, Callable[[], bool]])
    gone: set[int] = field(default_factory=set[int])
    samples: dict[int, GeneratedSample] = field(default_factory=dict[int, GeneratedSample])
    errors: dict[int, PpodError] = field(default_factory=dict[int, PpodError])
    order: list[int] = field(default_factory=list[int])
    steps: int = 0

    def emit(self, position: int, result: GeneratedSample) -> None:
        assert position not in self.samples
        self.samples[position] = result
        self.order.append(position)

    def fail(self, position: int, error: PpodError) -> None:
        self.errors[position] = error
        self.order.append(position)

    def abandoned(self, position: int) -> bool:
        return position in self.gone

    def more(self) -> Sequence[GenerationItem]:
        return self.joining.pop(self.steps, [])

    def between_steps(self) -> bool:
        self.steps += 1
        pause = self.pauses.get(self.steps)
        return pause() if pause is not None else False


@dataclass(frozen=True)
class Bench:
    """A model with its engine."""

    model: CausalModel
    weights: Versions
    engine: GenerationEngine

    def run(self, items: Sequence[GenerationItem], sink: StepSink | None = None) -> StepSink:
        sink = sink or StepSink()
        self.engine.run(items, sink)
        return sink

    def alone(self, item: GenerationItem) -> GeneratedSample:
        return self.run([item]).samples[0]

    @property
    def decoder(self) -> SlotDecoder:
        return self.engine._decoder  # pyright: ignore[reportPrivateUsage]


def load_bench(
    directory: Path | str, *, attention: str = "sdpa", dtype: str = "float32", prefill_tokens: int = 1024
) -> Bench:
    """Load a model and make its engine."""
    config = ModelConfig.model_validate(
        {"source": str(directory), "device": "cpu", "dtype": dtype, "attention": attention, "threads": 1}
    )
    model = load_causal_model(config, "policy", 16_384)
    weights = Versions()
    return Bench(model, weights, GenerationEngine(model, weights, model.tokenizer, prefill_tokens))


def item(
    prompt: Sequence[int],
    seed: int = 0,
    max_tokens: int = 20,
    *,
    token_filter: TokenFilter | None = None,
    stop_strings: tuple[str, ...] = (),
    stop_ids: Sequence[int] = (),
    resumed: int = 0,
    weight_version: int | None = None,
) -> GenerationItem:
    """A completion to sample; without stop ids its length is `max_tokens`."""
    return GenerationItem(
        prompt_index=0,
        sample=0,
        prompt=np.asarray(prompt, dtype=np.int32),
        seed=seed,
        max_tokens=max_tokens,
        token_filter=token_filter or TokenFilter(temperature=1.0),
        stop_ids=frozenset(stop_ids),
        stop_strings=stop_strings,
        resumed=resumed,
        unscaled=False,
        weight_version=weight_version,
    )
