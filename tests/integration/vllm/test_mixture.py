"""A mixture of experts on a vLLM engine: transformers stacks what a checkpoint holds apart, and so it is pushed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ppod import Completion, GenerationClient, Internal, PpodError, Sampling, WeightClient
from support.architectures import build_architecture
from support.recomputed import chosen_logprobs, distributions
from support.sampling_reference import Rules
from support.tiny_model import build_tokenizer
from support.vllm_services import BLOCK_SIZE, HALF_LOADING_VARIABLE, HALF_LOADING_WORKER, running_vllm
from support.weight_tensors import weight_tensors

GAP = 5e-5
PROMPTS = [[60, 61, 62], [40], list(range(70, 90))]


def check(client: GenerationClient, model: torch.nn.Module, weight_version: int) -> None:
    """Every token's logprob is that of a full forward of `model`."""
    for prompt, done in zip(
        PROMPTS, client.generate(PROMPTS, Sampling(max_tokens=12, ignore_eos=True), seeds=[1, 2, 3]), strict=True
    ):
        tokens = done.token_ids.tolist()
        expected = chosen_logprobs(distributions(model, prompt, tokens, Rules()), tokens)
        np.testing.assert_allclose(done.logprobs, expected, atol=GAP)
        assert [span.weight_version for span in done.weight_spans] == [weight_version]


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def shuffle(model: PreTrainedModel, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[torch.randperm(len(parameter))])


@pytest.mark.parametrize(
    ("kind", "further", "own"),
    [
        ("mixtral", {"sliding_window": None}, {}),
        ("mixtral", {"sliding_window": None}, {"stage_weights": False}),
        ("glm4_moe", {"head_dim": 32}, {}),
        ("gpt_oss", {"sliding_window": 64}, {}),
        # Of the workers the first alone has the experts' last biases.
        (
            "gpt_oss",
            {"sliding_window": 64, "num_key_value_heads": 2, "intermediate_size": 128},
            {"tensor_parallel_size": 2},
        ),
    ],
)
def test_experts_that_were_pushed_are_those_that_sample(
    tmp_path: Path, kind: str, further: dict[str, object], own: dict[str, object]
) -> None:
    model = build_architecture(kind, **further)
    if kind == "gpt_oss":
        model.set_attn_implementation("eager")
    with (
        running_vllm(saved(model, tmp_path / "model"), tmp_path, {"vllm": own}) as service,
        WeightClient(service.admin_target) as weights,
        GenerationClient(service.target) as client,
    ):
        check(client, model, 0)
        # Twice: what the first one left in place is what the second one finds.
        for version in (1, 2):
            shuffle(model, version)
            weights.prepare(version, weight_tensors(model, torch.float32))
            weights.commit(version)
            check(client, model, version)


def test_weights_that_vllm_would_lose_leave_the_old_ones_serving(tmp_path: Path) -> None:
    """Loaded at their commit, some models' go into parameters that are on no device then, and count as loaded."""
    model = build_architecture("gpt_oss", sliding_window=64)
    model.set_attn_implementation("eager")
    with (
        running_vllm(saved(model, tmp_path / "model"), tmp_path, {"vllm": {"stage_weights": False}}) as service,
        WeightClient(service.admin_target) as weights,
        GenerationClient(service.target) as client,
    ):
        check(client, model, 0)
        other = build_architecture("gpt_oss", sliding_window=64)
        shuffle(other, 1)
        weights.prepare(1, weight_tensors(other, torch.float32))
        with pytest.raises(Internal, match=r"the old one serves on: .* of GptOssForCausalLM lost \d+ parameters"):
            weights.commit(1)
        check(client, model, 0)


def test_a_version_that_is_there_in_part_never_samples(tmp_path: Path) -> None:
    """Layers that cannot be loaded again have what was loaded beside, and the old one is not put together from both."""
    model = build_architecture("gpt_oss", sliding_window=64)
    fails = tmp_path / "fails"
    fails.touch()
    further = {"vllm": {"engine_args": {"block_size": BLOCK_SIZE, "worker_cls": HALF_LOADING_WORKER}}}
    variables = {HALF_LOADING_VARIABLE: str(fails)}
    with (
        running_vllm(saved(model, tmp_path / "model"), tmp_path, further, variables) as service,
        WeightClient(service.admin_target) as weights,
    ):
        shuffle(model, 1)
        weights.prepare(1, weight_tensors(model, torch.float32))
        with pytest.raises(PpodError):
            weights.commit(1)
        assert service.wait(60) == 1
        assert "nor the old ones restored" in service.stderr


def test_what_vllm_makes_of_weights_that_were_pushed_is_what_it_makes_of_a_checkpoint(tmp_path: Path) -> None:
    """It holds parts of some layers once more, as parameters that nobody loads."""
    # The only sizes for which it has such attention on CPUs.
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    model = build_architecture("deepseek_v3", topk_method="noaux_tc", num_hidden_layers=2, **sizes)
    first = saved(model, tmp_path / "first")
    shuffle(model, 1)
    second = saved(model, tmp_path / "second")
    with running_vllm(second, tmp_path) as service, GenerationClient(service.target) as client:
        expected = one_by_one(client)
    with (
        running_vllm(first, tmp_path) as service,
        WeightClient(service.admin_target) as weights,
        GenerationClient(service.target) as client,
    ):
        before = one_by_one(client)
        weights.prepare(1, weight_tensors(model, torch.float32))
        weights.commit(1)
        pushed = one_by_one(client)
    for old, found, wanted in zip(before, pushed, expected, strict=True):
        assert found.token_ids.tolist() == wanted.token_ids.tolist() != old.token_ids.tolist()
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=GAP)


def one_by_one(client: GenerationClient) -> list[Completion]:
    """Greedy, each alone: this attention's results on CPUs are others in company."""
    greedy = Sampling(max_tokens=6, ignore_eos=True, temperature=0)
    return [done for prompt in PROMPTS for done in client.generate([prompt], greedy)]
