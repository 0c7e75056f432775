"""What both sides of the benchmark are given. ppod's environment and TRL's both import it."""

from __future__ import annotations

import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Side:
    """How one side computes.

    Attributes:
        dtype: "float32", or "bfloat16": autocast for what is trained, bfloat16 weights for what is not.
        attention: implementation in transformers.
        tuned: with the environment that ppod's launcher gives its processes (OpenMP's spinning, malloc's limits).
    """

    dtype: str
    attention: str
    tuned: bool


def peak_mib() -> float:
    """The most memory that this process has had, in MiB: of the CUDA device's tensors, or else of all that it is."""
    import torch  # noqa: PLC0415 - settings are read without it, too

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PPOD = Side("bfloat16", "eager", tuned=True)
"""ppod's default run on a CPU."""

CUDA = Side("bfloat16", "sdpa", tuned=True)
TRL = Side("float32", "sdpa", tuned=False)
"""TRL as it comes: PPOConfig's and from_pretrained's defaults."""

TRL_CUDA = Side("bfloat16", "sdpa", tuned=False)
"""The same on a CUDA device, where PPOConfig's default is bfloat16."""

TUNED_FLOAT32 = Side("float32", "eager", tuned=True)
SMALL = Side("float32", "sdpa", tuned=True)


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, and what pays it.

    Attributes:
        model: source of policy, reference and the reward model's trunk.
        head: name or directory of the reward model's head.
    """

    model: str = "packaged:smollm2-135m-instruct"
    head: str = "reviews-reward"


@dataclass(frozen=True, slots=True)
class Setting:
    """One PPO task, and how each side computes it.

    Attributes:
        name: for tables and directories.
        batch_size: samples in a step.
        prompt_tokens: the first tokens of a movie review.
        response_tokens: longest response.
        epochs: passes over the batch in a step.
        minibatches: optimizer steps in a pass.
        ppod_value_learning_rate: of ppod's value head; None: `learning_rate`, as of TRL's value model.
    """

    name: str
    batch_size: int
    prompt_tokens: int
    response_tokens: int
    epochs: int
    minibatches: int
    trl: Side
    ppod: Side
    learning_rate: float = 2e-5
    kl_coefficient: float = 0.05
    temperature: float = 1.0
    seed: int = 0
    ppod_value_learning_rate: float | None = None


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("as-they-come", 32, 6, 24, 2, 2, trl=TRL, ppod=PPOD),
        # For CPUs that emulate bfloat16.
        Setting("as-they-come-float32", 32, 6, 24, 2, 2, trl=TRL, ppod=TUNED_FLOAT32),
        Setting("as-they-come-single", 16, 20, 32, 1, 1, trl=TRL, ppod=PPOD),
        # TRL with all that ppod's launcher and configuration do for speed, to see what the programs themselves cost.
        Setting("equal-bfloat16", 32, 6, 24, 2, 2, trl=PPOD, ppod=PPOD),
        # The size of the packaged run file for CUDA devices; its attention there is sdpa.
        Setting("cuda", 128, 6, 48, 2, 2, trl=TRL_CUDA, ppod=CUDA),
        Setting("cuda-float32", 128, 6, 48, 2, 2, trl=TRL, ppod=CUDA),
        Setting("equal-float32", 32, 6, 24, 2, 2, trl=TUNED_FLOAT32, ppod=TUNED_FLOAT32),
        # What is learnt, with the numbers of ppod's default run: curves.py.
        Setting(
            *("default-run", 32, 6, 24, 2, 2, TRL, PPOD),
            learning_rate=5e-5,
            kl_coefficient=0.035,
            ppod_value_learning_rate=1e-3,
        ),
        # The same for CPUs that emulate bfloat16.
        Setting(
            *("default-run-float32", 32, 6, 24, 2, 2, TRL, TUNED_FLOAT32),
            learning_rate=5e-5,
            kl_coefficient=0.035,
            ppod_value_learning_rate=1e-3,
        ),
        Setting("small-model", 32, 6, 24, 2, 2, SMALL, SMALL, learning_rate=3e-4, kl_coefficient=0.035),
        # The same with more and smaller steps, each by the whole batch.
        Setting("small-steps", 32, 6, 24, 8, 1, SMALL, SMALL, learning_rate=1e-4, kl_coefficient=0.035),
    )
}
