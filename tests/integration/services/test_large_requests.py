"""Requests of more than a server takes at once: the client asks in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppod import InvalidArgument, ReferenceClient, RewardClient
from support.processes import ServiceProcess, running_service
from support.services import tiny_model_config


@pytest.mark.parametrize("bound", [{"max_queue_tokens": 128}, {"max_queue_sequences": 5}])
def test_more_than_the_queue_of_one_server_holds_is_asked_in_parts(
    reference_service: ServiceProcess, tiny_model_dir: Path, tmp_path: Path, bound: dict[str, int]
) -> None:
    sequences = [np.arange(1 + index, 21 + index) for index in range(24)]
    prompts = [1] * len(sequences)
    with ReferenceClient(reference_service.target) as client:
        expected = client.logprobs(sequences, prompts).values
    codes: list[str] = []
    values = {"model": tiny_model_config(tiny_model_dir), "batching": {"max_batch_tokens": 64, **bound}}
    with (
        running_service("ppod_services.reference", tmp_path, values) as service,
        ReferenceClient(service.target, observer=lambda _, __, code: codes.append(code)) as client,
    ):
        found = client.logprobs(sequences, prompts).values
        refused = codes.count("INVALID_ARGUMENT")
        assert refused
        # What the server takes is known by then.
        client.logprobs(sequences, prompts)
        assert codes.count("INVALID_ARGUMENT") == refused
    for parts, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_more_scores_along_the_way_than_a_request_may_ask_for_are_asked_in_parts(
    reward_service: ServiceProcess, tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path: Path
) -> None:
    sequences = [np.arange(1 + index, 11 + index) for index in range(6)]
    prompts = [2] * len(sequences)
    with RewardClient(reward_service.target) as client:
        expected = client.score(sequences, prompt_lengths=prompts, process=1).process
    reward = {"name": "first", "model": tiny_model_config(tiny_model_dir), "head": str(tiny_heads["first"])}
    values = {"rewards": [reward], "max_process_positions": 20}
    with (
        running_service("ppod_services.reward", tmp_path, values) as service,
        RewardClient(service.target) as client,
    ):
        found = client.score(sequences, prompt_lengths=prompts, process=1).process
        # One sequence alone cannot be divided.
        with pytest.raises(InvalidArgument, match="28 positions, expected at most 20"):
            client.score([np.arange(1, 30)], prompt_lengths=[1], process=1)
    assert expected is not None
    assert found is not None
    for parts, whole in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(parts, whole, atol=1e-4)
