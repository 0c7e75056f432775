"""vLLM's own models in the test's process, as its workers have them, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ppod_services.generation.vllm_backend.reload import form_of
from ppod_services.generation.vllm_backend.staging import TensorAt
from ppod_services.generation.vllm_backend.standby import Standby, standby_of
from support.services import TEST_DEVICE
from support.tiny_model import build_tokenizer
from support.vllm_services import require_vllm

DEVICE = torch.device(TEST_DEVICE)


@contextmanager
def one_worker() -> Iterator[None]:
    """The process groups of an engine of one worker, in this process."""
    require_vllm()
    from vllm.config import VllmConfig, set_current_vllm_config  # pyright: ignore  # noqa: PLC0415
    from vllm.distributed import parallel_state  # pyright: ignore  # noqa: PLC0415

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            # As vLLM's worker does on a CPU: its loaders call it there, too.
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def engine_model(directory: Path, dtype: str) -> tuple[Any, nn.Module]:
    """vLLM's configuration and model of a checkpoint, loaded as an engine does."""
    from vllm.config import set_current_vllm_config  # pyright: ignore  # noqa: PLC0415
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore  # noqa: PLC0415
    from vllm.model_executor.model_loader import get_model  # pyright: ignore  # noqa: PLC0415

    config = EngineArgs(model=str(directory), dtype=dtype, enforce_eager=True, max_model_len=64).create_engine_config()
    with set_current_vllm_config(config):
        return config, get_model(vllm_config=config)


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def pushed(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.data) for name, parameter in model.named_parameters()]


def standby(config: Any, serving: nn.Module, model: nn.Module) -> Standby | None:
    tensors: list[TensorAt] = [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0) for name, tensor in pushed(model)
    ]
    return standby_of(serving, DEVICE, form_of(config), tensors)


def served_beside(policy: PreTrainedModel, directory: Path, dtype: str) -> tuple[Any, nn.Module, Standby]:
    """vLLM's configuration and model of a policy that is saved in `directory`, and the second set of its parameters."""
    config, serving = engine_model(saved(policy, directory), dtype)
    second = standby(config, serving, policy)
    assert second is not None
    return config, serving, second


@torch.no_grad()
def computed(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, and what the layers that a CPU packs make of some input."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        linear = module.__dict__.get("cpu_linear")
        if linear is not None:
            width = getattr(module, "input_size", None) or getattr(module, "embedding_dim")  # noqa: B009
            # Some routers compute in float32.
            some = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(DEVICE, module.weight.dtype)
            found[f"{name}()"] = linear(some, module.weight, None)
    return found


def assert_computes(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = computed(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def shuffle(model: PreTrainedModel, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # One-dimensional ones may be all alike.
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
