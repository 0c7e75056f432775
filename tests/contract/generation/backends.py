"""The backends that the suite runs against, and what may differ between them.

To add one, add an entry to `BACKENDS` and its lines to `GAPS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ppod.client import SeedPromise
from support.processes import ServiceProcess
from support.services import FLOAT32_GAP, TEST_DEVICE
from support.vllm_services import VALUES


@dataclass(frozen=True)
class Backend:
    """A way to run the generation service.

    Attributes:
        name: of the backend.
        module: what the service is started with.
        values: its configuration, besides the model.
        device: as the model's configuration has it.
        requires: a module without which it cannot run here; empty: none.
        seed_promise: what it tells of seeds.
        repeats_bits: whether a repeated request gives the same bits, not only the same tokens.
        slow_start: whether one service must do for all tests of a dtype, those that change its weights included, who
            put them back.
    """

    name: str
    module: str = "ppod_services.generation"
    values: dict[str, object] = field(default_factory=dict[str, object])
    device: str = TEST_DEVICE
    requires: str = ""
    seed_promise: SeedPromise = SeedPromise.EVERY_REPLICA
    repeats_bits: bool = True
    slow_start: bool = False


BACKENDS = [
    Backend("transformers"),
    Backend(
        "vllm",
        values=VALUES,
        device="auto",
        requires="vllm",
        seed_promise=SeedPromise.UNINTERRUPTED,
        slow_start=True,
    ),
]


@dataclass(frozen=True)
class Gap:
    """How far a sampler's logprobs may be from those of a full forward of the same weights, in nats.

    Attributes:
        largest: of any token.
        mean: absolute, over the tokens of the test.
    """

    largest: float
    mean: float


_FLOAT32 = Gap(largest=FLOAT32_GAP, mean=FLOAT32_GAP / 10)
GAPS = {
    ("transformers", "float32"): _FLOAT32,
    ("transformers", "bfloat16"): Gap(largest=0.25, mean=0.03),
    ("vllm", "float32"): _FLOAT32,
    ("vllm", "bfloat16"): Gap(largest=0.3, mean=0.05),
}
"""By backend and dtype. In bfloat16 both sides round every product to 8 bits, in an order of their own."""


@dataclass(frozen=True)
class Served:
    """A running backend with the tiny model, and that model for recomputations."""

    backend: Backend
    dtype: str
    service: ServiceProcess
    model: torch.nn.Module

    @property
    def gap(self) -> Gap:
        return GAPS[self.backend.name, self.dtype]
