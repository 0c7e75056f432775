"""Ranks that load a policy by parts: together they hold what one holds, and none holds much more than its part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ppod_trainer.config import TrainerConfig
from ppod_trainer.parted_weights import stored_dtype
from ppod_trainer.policy_loading import load_policy
from ppod_trainer.ranks import Ranks
from support.processes import write_config
from support.ranked_loading import describe, tensors_of
from support.ranks import start_ranks, wait_for_ranks
from support.services import tiny_model_config
from support.tiny_classifiers import save_decoder
from support.tiny_model import VOCAB_SIZE, build_model, build_tokenizer

LOADING = "support.ranked_loading"
Sections = Mapping[str, object]


def gemma() -> PreTrainedModel:
    """Its embeddings are scaled by a buffer that no file holds and that bfloat16 would round: sqrt(48)."""
    torch.manual_seed(2)
    config = Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return Gemma3ForCausalLM(config).eval()


def experts() -> PreTrainedModel:
    """Its files hold each expert's weights, which transformers stacks."""
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    return Qwen3MoeForCausalLM(config).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": build_model,
    "untied": lambda: build_model(tied=False),
    "gemma": gemma,
    "experts": experts,
}


def save(directory: Path, model: PreTrainedModel, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(directory)  # pyright: ignore[reportArgumentType]
    build_tokenizer().save_pretrained(directory)
    return directory


def load_on_ranks(directory: Path, ranks: int, sections: Sections, *options: str) -> list[dict[str, int]]:
    """Peak memory of each rank, in bytes; see `support.ranked_loading`."""
    config = write_config(directory / "run.yaml", {"run_dir": str(directory), **sections})
    arguments = ("--config", str(config), *options)
    for code, _, stderr in wait_for_ranks(
        start_ranks(LOADING, *arguments, ranks=ranks, directory=directory, name="load"), 100
    ):
        assert code == 0, stderr
    return [json.loads((directory / f"loaded-{rank}.json").read_text()) for rank in range(ranks)]


def assert_loads_what_one_does(directory: Path, ranks: int, sections: Sections) -> None:
    load_on_ranks(directory, ranks, sections, "--whole")
    one = load_policy(TrainerConfig.model_validate({"run_dir": str(directory), **sections}), Ranks(torch.device("cpu")))
    expected, found = tensors_of(one.policy), load_file(directory / "whole.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    described = json.loads((directory / "parameters.json").read_text())
    assert {name: tuple(each) for name, each in described.items()} == describe(one.policy)


@pytest.mark.parametrize(
    ("model", "dtype", "ranks"),
    [
        ("tied", torch.float32, 2),
        ("tied", torch.bfloat16, 3),
        ("untied", torch.bfloat16, 2),
        ("untied", torch.float16, 3),
        ("gemma", torch.bfloat16, 2),
        ("experts", torch.bfloat16, 2),
    ],
)
def test_all_weights_are_those_of_a_whole_load(tmp_path: Path, model: str, dtype: torch.dtype, ranks: int) -> None:
    """Three ranks do not divide the rows evenly."""
    directory = save(tmp_path / "model", MODELS[model](), dtype)
    assert stored_dtype(directory) == dtype
    assert_loads_what_one_does(tmp_path, ranks, {"policy": tiny_model_config(directory)})


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_adapter_begins_the_same_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    directory = save(tmp_path / "model", build_model(), torch.bfloat16)
    policy = {**tiny_model_config(directory), "lora": {"rank": 4}}
    memory = {"gradient_checkpointing": True}
    assert_loads_what_one_does(tmp_path, ranks, {"policy": policy, "seed": 5, "memory": memory})
    found = load_file(tmp_path / "whole.safetensors")
    assert all(tensor.any() for name, tensor in found.items() if ".lora_A" in name)
    assert not any(tensor.any() for name, tensor in found.items() if ".lora_B" in name)


@pytest.mark.parametrize("source", ["reward", "policy"])
def test_a_critic_of_its_own_is_that_of_a_whole_load(tmp_path: Path, source: str) -> None:
    directory = save(tmp_path / "model", build_model(), torch.bfloat16)
    critic = {"kind": "model", "source": str(save_decoder(tmp_path / "reward", seed=3)) if source == "reward" else None}
    assert_loads_what_one_does(tmp_path, 3, {"policy": tiny_model_config(directory), "critic": critic})


def test_offloaded_weights_are_those_of_a_whole_load(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", build_model(), torch.bfloat16)
    sections = {"policy": tiny_model_config(directory), "memory": {"offload": True}}
    assert_loads_what_one_does(tmp_path, 1, sections)


def test_files_of_several_dtypes_lose_nothing(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", build_model(), torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.randn(64)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype(directory) == torch.float32
    assert_loads_what_one_does(tmp_path, 2, {"policy": tiny_model_config(directory)})


def test_a_rank_holds_little_more_than_its_part(tmp_path: Path) -> None:
    """Of four: a quarter of 220 MiB in float32, and what is mapped of files that are half as large."""
    config = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=1024, intermediate_size=8192, num_hidden_layers=2)
    directory = save(tmp_path / "model", LlamaForCausalLM(config), torch.bfloat16)
    for grown in load_on_ranks(tmp_path, 4, {"policy": tiny_model_config(directory)}):
        assert grown["model"] > 200 * 2**20
        assert grown["own"] < 0.3 * grown["model"]
        assert grown["peak"] < 0.7 * grown["model"]
