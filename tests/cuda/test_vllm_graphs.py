"""vLLM as it runs on GPUs by default, compiled and with CUDA graphs: what they captured takes new weights too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ppod import GenerationClient, Sampling, WeightClient
from ppod.client import WeightPause
from ppod_trainer.config import CollectiveConfig, WeightTransferConfig
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.broadcasts import ANOTHER_HOST
from support.processes import ServiceProcess, free_ports
from support.recomputed import chosen_logprobs, distributions
from support.sampling_reference import Rules
from support.tiny_model import MAX_TOKENS, build_model
from support.vllm_services import running_vllm
from support.weight_tensors import weight_tensors

PROMPTS = [[5, 6, 7], [60, 61], list(range(70, 90))]
SIGNAL = [3] * (MAX_TOKENS - 2)
"""A prompt that leaves room for two tokens: when its completion is here, the others have just begun."""
GAP = 5e-5


@pytest.fixture(scope="module", params=["service", "workers"])
def served(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServiceProcess, WeightSync]]:
    values = {
        "vllm": {"enforce_eager": False, "gpu_memory_utilization": 0.05, "weights_received_by": request.param},
        "weights": {"collective_addresses": ["127.0.0.1:*"]},
    }
    config = WeightTransferConfig(pause="keep")
    if request.param == "workers":
        collective = CollectiveConfig(port=free_ports(1)[0], bucket_mib=1, backend="nccl")
        config = WeightTransferConfig(pause="keep", plane="collective", collective=collective)
    with running_vllm(tiny_model_dir, tmp_path_factory.mktemp("vllm"), values, ANOTHER_HOST) as service:
        sync = WeightSync(FixedReplicas([WeightClient(service.admin_target, timeout_s=60)], "stop"), config)
        yield service, sync
        sync.close()


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the CPU as it serves after a push in that type."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model.cpu()


def check(service: ServiceProcess, model: torch.nn.Module, version: int) -> None:
    """Every token's logprob is that of a full forward of `model`."""
    with GenerationClient(service.target) as client:
        completions = client.generate(PROMPTS, Sampling(max_tokens=12, ignore_eos=True), seeds=[1, 2, 3])
    for prompt, done in zip(PROMPTS, completions, strict=True):
        tokens = done.token_ids.tolist()
        assert [span.weight_version for span in done.weight_spans] == [version]
        expected = chosen_logprobs(distributions(model, prompt, tokens, Rules()), tokens)
        np.testing.assert_allclose(done.logprobs, expected, atol=GAP)


def test_what_was_captured_samples_from_the_weights_that_were_pushed(
    served: tuple[ServiceProcess, WeightSync],
) -> None:
    service, sync = served
    check(service, build_model(), 0)
    for version, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32), start=1):
        model = build_model(seed=900 + version).to("cuda:0")
        sync.push(model, dtype, version)
        check(service, rounded(model, dtype), version)


def test_sequences_that_a_commit_keeps_go_on_with_the_new_weights(served: tuple[ServiceProcess, WeightSync]) -> None:
    service, sync = served
    before = max(sync.serving_versions())
    models = {before + 1: build_model(seed=1_001), before + 2: build_model(seed=1_002)}
    sync.push(models[before + 1].to("cuda:0"), torch.float32, before + 1)
    with WeightClient(service.admin_target) as weights, GenerationClient(service.target) as client:
        weights.prepare(before + 2, weight_tensors(models[before + 2]))
        stream = client.stream([SIGNAL, PROMPTS[0]], Sampling(100, ignore_eos=True), seeds=[1, 2])
        assert next(stream).index == 0
        weights.commit(before + 2, pause=WeightPause.KEEP)
        kept = next(stream)
    assert [span.weight_version for span in kept.weight_spans][-1] == before + 2
    begin, tokens = 0, kept.token_ids.tolist()
    for span in kept.weight_spans:
        rows = distributions(models[span.weight_version].cpu(), PROMPTS[0], tokens, Rules())
        end = begin + span.tokens
        np.testing.assert_allclose(kept.logprobs[begin:end], chosen_logprobs(rows, tokens)[begin:end], atol=GAP)
        begin = end
