"""A tiny policy and rollouts with mixed lengths, for tests that need no service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ppod_models.loading import load_causal_lm
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn

CPU = torch.device("cpu")
TEMPERATURE = 0.7


@pytest.fixture
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return load_causal_lm(tiny_model_dir, device=CPU, dtype=torch.float32)


@pytest.fixture
def policy(model: PreTrainedModel) -> PolicyWithValue:
    made = PolicyWithValue(model, compute_dtype=torch.float32)
    torch.manual_seed(1)
    torch.nn.init.normal_(made.value_head.weight, std=0.1)
    return made


@pytest.fixture
def make_rollouts() -> Callable[..., list[ScoredRollout]]:
    def make(count: int = 6, seed: int = 0) -> list[ScoredRollout]:
        generator = np.random.default_rng(seed)
        made: list[ScoredRollout] = []
        for index in range(count):
            prompt = generator.integers(0, 250, size=generator.integers(1, 6)).astype(np.int32)
            response = generator.integers(0, 250, size=generator.integers(1, 8)).astype(np.int32)
            logprobs = generator.normal(-3, 0.5, size=len(response)).astype(np.float32)
            versions = np.ones(len(response), dtype=np.int64)
            turn = Turn(
                response,
                logprobs,
                versions,
                truncated=bool(index % 2),
                stop_token=not index % 2,
                temperature=TEMPERATURE,
            )
            rollout = Rollout.of_turn(Prompt(index, prompt), turn, 100 + index)
            reference = (logprobs + generator.normal(0, 0.1, size=len(response))).astype(np.float32)
            made.append(ScoredRollout(rollout, float(generator.normal()), reference))
        return made

    return make
