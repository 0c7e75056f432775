"""Samplers as vLLM's two model runners have them, observed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ppod_services.generation.vllm_backend.observed_sampler import observe_sampler

TOKENS = torch.tensor([[2], [0]])


def output(logits: torch.Tensor, alternatives: int) -> Any:
    """Of a sampler that halved the temperature and drew TOKENS; alternatives stand behind the sampled one."""
    processed = torch.log_softmax(logits * 2, dim=-1)
    told = torch.cat([processed.gather(-1, TOKENS), processed.topk(alternatives).values], dim=1)
    return SimpleNamespace(sampled_token_ids=TOKENS.int(), logprobs_tensors=SimpleNamespace(logprobs=told))


class FirstSampler(nn.Module):
    def forward(self, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        found = output(logits, sampling_metadata.max_num_logprobs)
        logits.fill_(0.0)
        return found


@dataclass
class SecondSampler:
    """No module; asked by position, and for more than a call."""

    alternatives: int | None
    seeds: str = "its own"

    def get_logprobs_dims(self, idx_mapping_np: Any) -> tuple[int, int] | None:
        assert list(idx_mapping_np) == [0, 1]
        return None if self.alternatives is None else (self.alternatives, 0)

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        del input_batch
        if self.alternatives is None:
            return SimpleNamespace(sampled_token_ids=TOKENS.int(), logprobs_tensors=None)
        found = output(logits, self.alternatives)
        logits.fill_(0.0)
        return found


def logits() -> torch.Tensor:
    return torch.tensor([[0.5, -1.0, 3.0], [1.5, 0.0, -2.0]])


@pytest.mark.parametrize("alternatives", [0, 1, 2])
def test_the_first_runner_s(alternatives: int) -> None:
    runner = SimpleNamespace(sampler=FirstSampler())
    assert observe_sampler(runner)
    metadata = SimpleNamespace(max_num_logprobs=alternatives)
    check(runner.sampler(logits=logits(), sampling_metadata=metadata), alternatives)


@pytest.mark.parametrize("alternatives", [None, 0, 1, 2])
def test_the_second_runner_s(alternatives: int | None) -> None:
    sampler = SecondSampler(alternatives)
    runner = SimpleNamespace(sampler=sampler)
    assert observe_sampler(runner)
    assert runner.sampler.seeds == "its own"
    found = runner.sampler(logits(), SimpleNamespace(idx_mapping_np=np.arange(2)))
    if alternatives is None:
        assert found.logprobs_tensors is None
    else:
        check(found, alternatives)


def check(found: Any, alternatives: int) -> None:
    """The sampled tokens' logprobs as they were; their own ones behind, where there is room; the rest as it was."""
    expected = output(logits(), alternatives).logprobs_tensors.logprobs
    if alternatives:
        expected[:, 1] = torch.log_softmax(logits(), dim=-1).gather(-1, TOKENS).squeeze(-1)
    assert torch.equal(found.logprobs_tensors.logprobs, expected)


def test_another_sampler_is_left_alone() -> None:
    runner = SimpleNamespace(sampler=object())
    assert not observe_sampler(runner)


def test_a_part_of_a_pipeline_that_samples_nothing_hides_nothing() -> None:
    runner = SimpleNamespace(sampler=None)
    assert observe_sampler(runner)
    assert runner.sampler is None
