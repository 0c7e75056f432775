"""Scored rollouts of random tokens with mixed lengths."""

from __future__ import annotations

import numpy as np

from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn

TEMPERATURE = 0.7


def random_rollouts(count: int = 6, seed: int = 0, longest_response: int = 7) -> list[ScoredRollout]:
    generator = np.random.default_rng(seed)
    made: list[ScoredRollout] = []
    for index in range(count):
        prompt = generator.integers(0, 250, size=generator.integers(1, 6)).astype(np.int32)
        response = generator.integers(0, 250, size=generator.integers(1, longest_response + 1)).astype(np.int32)
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
