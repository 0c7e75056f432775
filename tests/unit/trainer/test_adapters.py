"""LoRA and QLoRA policies against whole weights made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ppod_models.sources import ModelSourceError
from ppod_trainer.adapters import PolicyAdapter
from ppod_trainer.config import LoraConfig, TrainerConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.policy import PolicyWithValue, build_response_batch
from ppod_trainer.policy_loading import load_policy
from ppod_trainer.quantisation import load_quantised
from ppod_trainer.ranks import Ranks
from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.sharding import gather_parameters
from support.architectures import build_architecture
from support.optional import needs_bitsandbytes
from support.tiny_model import build_model

CPU = torch.device("cpu")
Make = Callable[..., list[ScoredRollout]]


def turned(model: PreTrainedModel) -> None:
    """Give every adapter layer a change; LoRA begins with none."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)


def parameters_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(gather_parameters(model, torch.float32, ""))


def logprobs(model: PreTrainedModel, rollouts: list[ScoredRollout]) -> torch.Tensor:
    policy = PolicyWithValue(model, compute_dtype=torch.float32)
    with torch.no_grad():
        return policy(build_response_batch(rollouts, CPU)).logprobs


def test_an_adapter_begins_as_its_base_and_is_all_that_learns(model: PreTrainedModel, make_rollouts: Make) -> None:
    before = logprobs(model, make_rollouts())
    names = dict(model.named_parameters()).keys()
    adapter = PolicyAdapter(model, LoraConfig(rank=4, alpha=8))
    assert torch.equal(logprobs(model, make_rollouts()), before)
    policy = PolicyWithValue(model, compute_dtype=torch.float32)
    policy(build_response_batch(make_rollouts(), CPU)).logprobs.sum().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name in dict(model.named_parameters()) if ".lora_" in name}
    assert len(policy.policy_parameters()) == len(learning)
    base = adapter.base(parameters_of(model))
    assert base.keys() == names
    for name, parameter in build_model().named_parameters():
        assert torch.equal(base[name], parameter), name


@pytest.mark.parametrize("stabilized", [False, True])
def test_merged_weights_are_the_base_and_the_scaled_product(
    model: PreTrainedModel, make_rollouts: Make, stabilized: bool
) -> None:
    adapter = PolicyAdapter(model, LoraConfig(rank=4, alpha=8, target_modules=("q_proj",), rank_stabilized=stabilized))
    turned(model)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, LoraLayer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base, merged = adapter.base(parameters_of(model)), adapter.merged(parameters_of(model))
    name = "model.layers.0.self_attn.q_proj.weight"
    scaling = 8 / (4**0.5 if stabilized else 4)
    torch.testing.assert_close(merged[name], base[name] + scaling * b @ a)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    whole = build_model()
    whole.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logprobs(whole, make_rollouts()), logprobs(model, make_rollouts()), atol=2e-5, rtol=1e-5)


def test_a_saved_adapter_is_one_that_peft_loads(model: PreTrainedModel, make_rollouts: Make, tmp_path: Path) -> None:
    adapter = PolicyAdapter(model, LoraConfig(rank=4, alpha=8))
    turned(model)
    adapter.save(tmp_path, adapter.saved(parameters_of(model)), "somewhere")
    loaded = PeftModel.from_pretrained(build_model(), tmp_path).get_base_model()
    assert torch.equal(logprobs(loaded, make_rollouts()), logprobs(model, make_rollouts()))


def test_layers_that_are_not_there_are_named(model: PreTrainedModel) -> None:
    with pytest.raises(TrainerError, match="wq_proj"):
        PolicyAdapter(model, LoraConfig(target_modules=("wq_proj",)))


def test_layers_that_are_not_linear_are_named() -> None:
    model = build_model(tied=False)
    with pytest.raises(TrainerError, match="embed_tokens is no linear layer"):
        PolicyAdapter(model, LoraConfig(target_modules=("q_proj", "embed_tokens")))


def test_all_linear_layers_of_a_mixture_are_those_beside_its_experts(make_rollouts: Make, tmp_path: Path) -> None:
    model = build_architecture("mixtral")
    adapter = PolicyAdapter(model, LoraConfig(rank=4, alpha=8))
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    expected = {f"model.layers.{layer}.self_attn.{part}" for layer in range(4) for part in parts}
    assert set(adapter.description.target_modules) == expected
    turned(model)
    whole = build_architecture("mixtral")
    whole.load_state_dict(adapter.merged(parameters_of(model)), strict=False)
    torch.testing.assert_close(logprobs(whole, make_rollouts()), logprobs(model, make_rollouts()), atol=2e-5, rtol=1e-5)
    adapter.save(tmp_path, adapter.saved(parameters_of(model)), "somewhere")
    loaded = PeftModel.from_pretrained(build_architecture("mixtral"), tmp_path).get_base_model()
    assert torch.equal(logprobs(loaded, make_rollouts()), logprobs(model, make_rollouts()))


def test_experts_and_transposed_layers_are_refused() -> None:
    with (
        pytest.warns(RuntimeWarning, match="rank_pattern|alpha_pattern"),
        pytest.raises(TrainerError, match=r"model\.layers\.0\.mlp\.experts is no linear layer"),
    ):
        PolicyAdapter(build_architecture("mixtral"), LoraConfig(target_modules=("q_proj", "w1", "w2", "w3")))
    with pytest.raises(TrainerError, match="the model has no linear layers"):
        PolicyAdapter(build_architecture("gpt2"), LoraConfig())
    with (
        pytest.warns(UserWarning, match="Conv1D"),
        pytest.raises(TrainerError, match=r"transformer\.h\.0\.attn\.c_attn is no linear layer"),
    ):
        PolicyAdapter(build_architecture("gpt2"), LoraConfig(target_modules=("c_attn",)))


def test_the_output_layer_is_refused() -> None:
    """Logprobs are taken with its weights alone, without what an adapter adds: it would never learn."""
    with pytest.raises(TrainerError, match="lm_head is the output layer"):
        PolicyAdapter(build_model(tied=False), LoraConfig(target_modules=("q_proj", "lm_head")))


def test_an_adapter_begins_by_its_seed_alone() -> None:
    def begun(seed: int) -> dict[str, torch.Tensor]:
        made = build_model()
        torch.seed()
        return PolicyAdapter(made, LoraConfig(rank=4), seed).saved(parameters_of(made))

    one, same, other = begun(1), begun(1), begun(2)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert [name for name in one if not torch.equal(one[name], other[name])] == [name for name in one if "_A." in name]


@pytest.mark.filterwarnings("ignore:.*bos_token_id:UserWarning")
def test_transposed_layers_are_refused_in_four_bits_too(tmp_path: Path) -> None:
    """bitsandbytes would turn them round, and services that get what they stand for would refuse the shape."""
    build_architecture("gpt2").save_pretrained(tmp_path)
    policy = {"source": str(tmp_path), "device": "cpu", "lora": {"quantization": "nf4"}}
    config = TrainerConfig.model_validate({"policy": policy})
    with pytest.raises(TrainerError, match=r"transformer\.h\.0\.attn\.c_attn keeps its weight transposed"):
        load_policy(config, Ranks(CPU))


@needs_bitsandbytes
def test_a_quantised_base_whose_output_layer_is_in_no_file_is_refused(tmp_path: Path) -> None:
    build_model(tied=False).base_model.save_pretrained(tmp_path)
    with pytest.raises(ModelSourceError, match=r"its weights lack lm_head\.weight"):
        load_quantised(tmp_path, device=CPU, dtype=torch.float32, attention="sdpa")


@needs_bitsandbytes
def test_a_quantised_base_is_what_its_dense_weights_say(tiny_model_dir: Path, make_rollouts: Make) -> None:
    """Generation and reference get the dense weights: they compute what the trainer does."""
    model = load_quantised(tiny_model_dir, device=CPU, dtype=torch.float32, attention="sdpa")
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype == torch.uint8
    adapter = PolicyAdapter(model, LoraConfig(rank=4, alpha=8))
    turned(model)
    whole = build_model(seed=1)
    whole.load_state_dict(adapter.merged(parameters_of(model)), strict=False)
    torch.testing.assert_close(logprobs(whole, make_rollouts()), logprobs(model, make_rollouts()), atol=1e-4, rtol=1e-4)
    original = dict(build_model().named_parameters())
    base = adapter.base(parameters_of(model))
    assert base.keys() == original.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    error = (base[name] - original[name]).abs().mean() / original[name].abs().mean()
    assert 0.01 < float(error.detach()) < 0.15


def test_peft_finds_the_base_of_a_saved_adapter_by_itself(
    model: PreTrainedModel,
    make_rollouts: Make,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked for in another working directory than the run's."""
    adapter = PolicyAdapter(model, LoraConfig(rank=4, target_modules=("q_proj",)))
    turned(model)
    monkeypatch.chdir(tiny_model_dir.parent)
    adapter.save(tmp_path, adapter.saved(parameters_of(model)), tiny_model_dir.name)
    monkeypatch.chdir(tmp_path)
    whole = AutoPeftModelForCausalLM.from_pretrained(tmp_path).merge_and_unload()
    torch.testing.assert_close(logprobs(whole, make_rollouts()), logprobs(model, make_rollouts()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("source", "named"), [("org/name@v1", ("org/name", "v1")), ("org/name", ("org/name", None))])
def test_a_saved_adapter_names_its_base_as_the_hub_does(
    model: PreTrainedModel, tmp_path: Path, source: str, named: tuple[str, str | None]
) -> None:
    adapter = PolicyAdapter(model, LoraConfig(rank=4, target_modules=("q_proj",)))
    adapter.save(tmp_path, adapter.saved(parameters_of(model)), source)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == named
