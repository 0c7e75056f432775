"""What vLLM is asked for: what it does not know, and on GPUs their data types, their memory and their steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppod_models.configuration import ConfigError, parse_config
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.generation.vllm_backend.loading import engine_arguments


def config(vllm: dict[str, object], dtype: str = "float32") -> GenerationServiceConfig:
    values = {"listen": {"port": 1}, "model": {"source": "x", "dtype": dtype}, "backend": "vllm", "vllm": vllm}
    return parse_config(GenerationServiceConfig, values, "test")


@pytest.mark.parametrize(
    ("dtype", "bfloat16", "found"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("float16", False, "float16"),
        ("float32", True, "float32"),
    ],
)
def test_a_gpu_computes_in_what_it_has(tiny_model_dir: Path, dtype: str, bfloat16: bool, found: str) -> None:
    """vLLM does not start in bfloat16 on a T4 or a V100."""
    arguments = engine_arguments(config({}, dtype), tiny_model_dir, "cuda", frozenset(), bfloat16=bfloat16)
    assert arguments["dtype"] == found


@pytest.mark.parametrize(
    ("platform", "vllm", "part"),
    [
        ("cuda", {}, 0.9),
        ("cuda", {"gpu_memory_utilization": 0.5}, 0.5),
        # vLLM would not start where other processes have more than a tenth of the GPU.
        ("cuda", {"kv_cache_gib": 2}, 0.01),
        ("cuda", {"kv_cache_gib": 2, "gpu_memory_utilization": 0.5}, 0.01),
        ("cpu", {"kv_cache_gib": 2}, 0.9),
    ],
)
def test_a_cache_of_a_given_size_asks_for_no_part_of_the_device(
    tiny_model_dir: Path, platform: str, vllm: dict[str, object], part: float
) -> None:
    found = engine_arguments(config(vllm), tiny_model_dir, platform, frozenset())
    assert found["gpu_memory_utilization"] == part


@pytest.mark.parametrize(("sequences", "tokens"), [(8_192, None), (8_193, 8_193), (65_536, 65_536)])
def test_a_step_has_a_token_for_each_sequence(tiny_model_dir: Path, sequences: int, tokens: int | None) -> None:
    def step_tokens(engine_args: dict[str, object]) -> object:
        asked = config({"engine_args": engine_args})
        batching = asked.batching.model_copy(update={"max_batch_size": sequences})
        asked = asked.model_copy(update={"batching": batching})
        known = frozenset({"max_num_batched_tokens"})
        return engine_arguments(asked, tiny_model_dir, "cuda", known).get("max_num_batched_tokens")

    assert step_tokens({}) == tokens
    assert step_tokens({"max_num_batched_tokens": 70_000}) == 70_000


def test_unknown_engine_arguments_and_devices_are_faults_of_the_configuration(tiny_model_dir: Path) -> None:
    wrong = config({"engine_args": {"block_sise": 32, "blocks": 1}})
    wrong = wrong.model_copy(update={"model": wrong.model.model_copy(update={"device": "cuda:1"})})
    with pytest.raises(ConfigError) as caught:
        engine_arguments(wrong, tiny_model_dir, "cpu", frozenset({"block_size"}))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "vllm.engine_args.block_sise",
        "vllm.engine_args.blocks",
        "model.device",
    ]
