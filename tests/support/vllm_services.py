"""Generation services on a real vLLM engine, with a tiny model; for environments that have vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from support.processes import ServiceProcess, running_service
from support.tiny_model import build_model, save_tiny_model

MAX_TOKENS = 256
BLOCK_SIZE = 32
START_TIMEOUT_S = 240.0


def require_vllm() -> None:
    """Skip the test where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: `make test-vllm` runs this in an environment that has it")


def build_vllm_model(seed: int = 0) -> LlamaForCausalLM:
    """The tiny model in a shape that vLLM takes."""
    return build_model(seed=seed, max_tokens=MAX_TOKENS)


def save_vllm_model(directory: Path) -> Path:
    """Save it with its tokenizer."""
    return save_tiny_model(directory, max_tokens=MAX_TOKENS)


def vllm_values(model_dir: Path) -> dict[str, object]:
    """Configuration of a generation service on vLLM."""
    return {
        "model": {"source": str(model_dir), "device": "cpu", "dtype": "float32", "threads": 1},
        "backend": "vllm",
        "vllm": {"kv_cache_gib": 0.125, "engine_args": {"block_size": BLOCK_SIZE}},
        "batching": {"max_batch_tokens": 8_192, "max_batch_size": 32},
        "limits": {"max_request_sequences": 1_024},
    }


@contextmanager
def running_vllm(model_dir: Path, directory: Path) -> Iterator[ServiceProcess]:
    """A generation service on vLLM."""
    values = vllm_values(model_dir)
    module = "ppod_services.generation"
    with running_service(module, directory, values, fresh=True, start_timeout_s=START_TIMEOUT_S) as service:
        yield service


def engine_processes(pid: int) -> list[psutil.Process]:
    """The processes that a service started, and theirs."""
    return psutil.Process(pid).children(recursive=True)


@torch.no_grad()
def next_logits(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, V], float64, that each token was drawn from: one full forward without padding and cache."""
    ids = [*prompt, *tokens]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(ids) - 1].double()


def chosen(logprobs: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The logprobs [tokens] of the tokens out of [tokens, V]."""
    return logprobs[range(len(tokens)), tokens]
