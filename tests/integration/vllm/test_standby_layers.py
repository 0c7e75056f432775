"""The second set beside layers of which vLLM keeps more than a weight: experts, sinks, latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppod_services.generation.vllm_backend.reload import load_pushed
from support.architectures import build_architecture
from support.vllm_models import (
    assert_computes,
    computed,
    engine_model,
    one_worker,
    pushed,
    saved,
    served_beside,
    shuffle,
    standby,
)

# vLLM's own, of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")
LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
"""The only ones for which vLLM has latent attention on CPUs."""


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """The process groups of an engine of one worker, in this process."""
    with one_worker():
        yield


class Attends:
    """What is kept of the sinks by attention that computes with them in float32, as FlashInfer's does."""

    def __init__(self, sinks: torch.Tensor) -> None:
        self._sinks = sinks
        self.sinks = sinks.to(torch.float32, copy=True)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        assert act_dtype == torch.bfloat16
        self.sinks.copy_(self._sinks)


def test_what_attention_keeps_of_its_sinks_is_of_the_version_that_serves(tmp_path: Path) -> None:
    policy = build_architecture("granite_swa")
    config, serving = engine_model(saved(policy, tmp_path), "bfloat16")
    blocks: list[Any] = [module for module in serving.modules() if hasattr(module, "sinks")]
    attention = [block.attn for block in blocks]
    assert len(attention) == 4
    for block in blocks:
        block.attn.impl = Attends(block.sinks)
    places = [layer.impl.sinks.data_ptr() for layer in attention]
    second = standby(config, serving, policy)
    assert second is not None
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    second.fill(pushed(policy))
    second.install()
    expected = {name: one for name, one in pushed(policy) if name.endswith("sinks")}
    for index, layer in enumerate(attention):
        sinks = expected[f"model.layers.{index}.self_attn.sinks"].bfloat16().float()
        assert torch.equal(layer.impl.sinks, sinks)
    # Captured graphs read them there.
    assert [layer.impl.sinks.data_ptr() for layer in attention] == places


def test_what_latent_attention_makes_of_its_projection_is_of_the_version_that_serves(tmp_path: Path) -> None:
    """Some of it lies elsewhere, as what workers that share a context gather of each other's heads."""
    policy = build_architecture("deepseek_v3", topk_method="noaux_tc", num_hidden_layers=2, **LATENT_SIZES)
    config, serving = engine_model(saved(policy, tmp_path / "0"), "float32")
    attention: list[Any] = [module for module in serving.modules() if type(module).__name__ == "MLAAttention"]
    assert len(attention) == 2
    if attention[0].is_amx_bmm_enabled:
        pytest.skip("these kernels of CPUs pack it, and leave nothing of its weight")
    for layer in attention:
        layer.dcp_q_replicate = True
        layer.process_weights_after_loading(torch.float32)
    places = [layer.W_UK_T_dcp_qrep.data_ptr() for layer in attention]
    second = standby(config, serving, policy)
    assert second is not None
    shuffle(policy, 1)
    before = computed(serving)
    second.fill(pushed(policy))
    assert_computes(serving, before)
    second.install()
    expected = computed(engine_model(saved(policy, tmp_path / "1"), "float32")[1])
    for index, layer in enumerate(attention):
        name = f"model.layers.{index}.self_attn.mla_attn.mla_attn.W_UK_T"
        expected[f"{name}_dcp_qrep"] = expected[name]
        # Captured graphs read it there.
        assert layer.W_UK_T_dcp_qrep.data_ptr() == places[index]
    assert_computes(serving, expected)


@pytest.mark.parametrize(
    ("kind", "further", "dtype"),
    [
        # Their loader copies biases and sinks into what is on no device then.
        ("gpt_oss", {"sliding_window": 64}, "float32"),
        ("gpt_oss", {"sliding_window": 64}, "bfloat16"),
        # A CPU pads these, when it starts and at no reload.
        ("mixtral", {"intermediate_size": 80}, "float32"),
        ("mixtral", {"intermediate_size": 80}, "bfloat16"),
    ],
)
def test_what_a_reload_would_lose_or_refuse_is_loaded_beside(
    tmp_path: Path, kind: str, further: dict[str, object], dtype: str
) -> None:
    policy = build_architecture(kind, **further)
    _, serving, second = served_beside(policy, tmp_path / "0", dtype)
    for version in (1, 2):
        shuffle(policy, version)
        second.fill(pushed(policy))
        second.install()
        assert_computes(serving, computed(engine_model(saved(policy, tmp_path / str(version)), dtype)[1]))


def test_what_was_pushed_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker alone adds some biases; the others' loaders write 0 to what all of them read."""
    policy = build_architecture("gpt_oss", sliding_window=64)
    config, serving = engine_model(saved(policy, tmp_path), "float32")
    load: Any = type(serving).load_weights

    def as_another_worker(model: nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        return load(model, ((name, one.zero_() if name.endswith("down_proj_bias") else one) for name, one in weights))

    monkeypatch.setattr(type(serving), "load_weights", as_another_worker)
    second = standby(config, serving, policy)
    assert second is not None
    given = [(name, tensor.clone()) for name, tensor in pushed(policy)]
    second.fill(given)
    second.install()
    for (name, found), (_, expected) in zip(given, pushed(policy), strict=True):
        assert torch.equal(found, expected), name
    biases = [one for name, one in serving.named_parameters() if name.endswith("w2_bias")]
    assert len(biases) == 4
    assert not any(one.any() for one in biases)


def test_a_convolution_that_is_read_beside_its_parameter_is_loaded_again(tmp_path: Path) -> None:
    """CPUs with instructions for bfloat16 pack it elsewhere, and Mamba 2 computes with what was there before."""
    policy = build_architecture("falcon_h1")
    config, serving = engine_model(saved(policy, tmp_path / "0"), "bfloat16")
    shuffle(policy, 1)
    load_pushed(config, serving, pushed(policy))
    expected = dict(engine_model(saved(policy, tmp_path / "1"), "bfloat16")[1].named_buffers())
    found = dict(serving.named_buffers())
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.endswith("conv_weights")]) == 4
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name
