"""Reference logprobs over the wire against a naive log_softmax, sequence by sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppod import ReferenceClient
from support.processes import ServiceProcess
from support.tiny_model import build_model

SEQUENCES = [[5, 6, 7, 8], [9, 1], list(range(40, 100)), [3, 3, 3, 256, 4, 4]]
PROMPT_LENGTHS = [2, 1, 59, 1]


@torch.no_grad()
def naive(tokens: list[int], prompt_length: int, temperature: float) -> np.ndarray:
    logits = build_model()(torch.tensor([tokens])).logits[0].double()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return np.array([float(logprobs[at - 1, tokens[at]]) for at in range(prompt_length, len(tokens))])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_naive_ones_whatever_the_batch(reference_service: ServiceProcess, temperature: float) -> None:
    with ReferenceClient(reference_service.target) as client:
        together = client.logprobs(SEQUENCES, PROMPT_LENGTHS, temperature=temperature)
        alone = [
            client.logprobs([tokens], [prompt_length], temperature=temperature).values[0]
            for tokens, prompt_length in zip(SEQUENCES, PROMPT_LENGTHS, strict=True)
        ]
    for index, (tokens, prompt_length) in enumerate(zip(SEQUENCES, PROMPT_LENGTHS, strict=True)):
        expected = naive(tokens, prompt_length, temperature)
        assert len(together.values[index]) == len(tokens) - prompt_length
        np.testing.assert_allclose(together.values[index], expected, atol=1e-5)
        np.testing.assert_allclose(alone[index], expected, atol=1e-5)


def test_requests_of_two_temperatures_do_not_mix(reference_service: ServiceProcess) -> None:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    temperatures = [0.5, 2.0] * 4
    with ReferenceClient(reference_service.target) as client, ThreadPoolExecutor(8) as pool:
        replies = list(
            pool.map(lambda value: client.logprobs(SEQUENCES, PROMPT_LENGTHS, temperature=value), temperatures)
        )
    for temperature, reply in zip(temperatures, replies, strict=True):
        np.testing.assert_allclose(reply.values[0], naive(SEQUENCES[0], 2, temperature), atol=1e-5)


def test_reply_says_who_answered_and_where_the_time_went(reference_service: ServiceProcess) -> None:
    with ReferenceClient(reference_service.target) as client:
        reply = client.logprobs(SEQUENCES, PROMPT_LENGTHS)
        described = client.describe()
    assert reply.state == described.state
    assert reply.state.model == "reference"
    assert reply.timing.tokens == sum(len(tokens) for tokens in SEQUENCES)
    assert reply.timing.compute_s > 0
