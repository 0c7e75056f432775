"""Entropy, top-k and LoRA adapters of the reference service, over the wire, against a naive whole softmax."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from torch import nn

from ppod import FailedPrecondition, InvalidArgument, NotFound, PpodError, WeightClient
from ppod.errors import from_rpc_error
from ppod.tensors import pack_sequences
from ppod.v1 import common_pb2, reference_pb2, reference_pb2_grpc
from support.processes import ServiceProcess, run_to_exit, running_service, write_config
from support.services import tiny_model_config
from support.tiny_adapter import build_adapted_model, save_tiny_adapter
from support.tiny_model import build_model
from support.weight_tensors import weight_tensors

SEQUENCES = [[5, 6, 7, 8], [9, 1], list(range(40, 100)), [3, 3, 3, 256, 4, 4]]
PROMPT_LENGTHS = [2, 1, 30, 1]
RESPONSE_TOKENS = sum(len(tokens) - prompt for tokens, prompt in zip(SEQUENCES, PROMPT_LENGTHS, strict=True))
MODULES = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("adapters")
    adapters = [
        {"name": name, "source": str(save_tiny_adapter(directory / name, seed=seed, target_modules=MODULES))}
        for seed, name in enumerate(["first", "second"])
    ]
    values = {"model": tiny_model_config(tiny_model_dir), "adapters": adapters}
    with running_service("ppod_services.reference", directory, values) as process:
        yield process


def compute(service: ServiceProcess, model: str = "", **fields: object) -> reference_pb2.ComputeLogprobsResponse:
    request = reference_pb2.ComputeLogprobsRequest(
        tokens=pack_sequences(SEQUENCES),
        prompt_lengths=PROMPT_LENGTHS,
        selector=common_pb2.ModelSelector(model=model),
        **fields,
    )
    with grpc.insecure_channel(service.target) as channel:
        return reference_pb2_grpc.ReferenceServiceStub(channel).ComputeLogprobs(request, timeout=30)


@torch.no_grad()
def naive(model: nn.Module, temperature: float) -> torch.Tensor:
    """float64 [response tokens, vocabulary] of log-probabilities, one sequence at a time."""
    rows = []
    for tokens, prompt in zip(SEQUENCES, PROMPT_LENGTHS, strict=True):
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
        rows.append(torch.log_softmax(logits / temperature, dim=-1)[prompt - 1 : -1])
    return torch.cat(rows)


def of_tokens(whole: torch.Tensor) -> np.ndarray:
    responses = [tokens[prompt:] for tokens, prompt in zip(SEQUENCES, PROMPT_LENGTHS, strict=True)]
    return whole.gather(-1, torch.from_numpy(np.concatenate(responses))[:, None])[:, 0].numpy()


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<f4")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_and_top_k_equal_a_whole_softmax(service: ServiceProcess, temperature: float) -> None:
    reply = compute(service, entropy=True, top_k=5, temperature=temperature)
    whole = naive(build_model(), temperature)
    np.testing.assert_allclose(floats(reply.logprobs), of_tokens(whole), atol=1e-5)
    np.testing.assert_allclose(floats(reply.entropies), -(whole.exp() * whole).sum(-1).numpy(), atol=1e-5)
    top = whole.topk(5, dim=-1)
    ids = np.frombuffer(reply.top_token_ids, dtype="<i4").reshape(RESPONSE_TOKENS, 5)
    np.testing.assert_array_equal(ids, top.indices.numpy())
    np.testing.assert_allclose(floats(reply.top_logprobs).reshape(ids.shape), top.values.numpy(), atol=1e-5)


def test_what_was_not_asked_for_is_not_sent_and_changes_nothing(service: ServiceProcess) -> None:
    plain, rich = compute(service), compute(service, entropy=True, top_k=64)
    assert not plain.entropies
    assert not plain.top_token_ids
    assert not plain.top_logprobs
    assert plain.logprobs == rich.logprobs


def test_each_adapter_and_the_base_answer_for_themselves(service: ServiceProcess) -> None:
    """Asked for in turns, so that an adapter left on would show in the next reply."""
    models = {
        "first": build_adapted_model(seed=0, target_modules=MODULES),
        "reference": build_model(),
        "second": build_adapted_model(seed=1, target_modules=MODULES),
    }
    expected = {name: of_tokens(naive(model, 1.0)) for name, model in models.items()}
    assert np.abs(expected["first"] - expected["reference"]).mean() > 0.1
    assert np.abs(expected["first"] - expected["second"]).mean() > 0.1
    for name in ["first", "reference", "second", "reference", "first"]:
        reply = compute(service, name)
        assert reply.model.model == name
        np.testing.assert_allclose(floats(reply.logprobs), expected[name], atol=1e-5)


def test_new_weights_of_the_base_reach_the_base_and_its_adapters(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", target_modules=MODULES)
    values = {"model": tiny_model_config(tiny_model_dir), "adapters": [{"name": "lora", "source": str(adapter)}]}
    refreshed = build_model(seed=7)
    with running_service("ppod_services.reference", tmp_path, values) as service:
        before = compute(service, "lora")
        with WeightClient(service.admin_target) as weights:
            weights.prepare(1, weight_tensors(refreshed))
            weights.commit(1)
        base, lora = compute(service, "reference"), compute(service, "lora")
    assert [before.model.weight_version, base.model.weight_version, lora.model.weight_version] == [0, 1, 1]
    np.testing.assert_allclose(floats(base.logprobs), of_tokens(naive(refreshed, 1.0)), atol=1e-5)
    adapted = build_adapted_model(target_modules=MODULES)
    parameters = dict(adapted.get_base_model().named_parameters())
    adapted_weights = {name.replace(".base_layer", ""): value for name, value in parameters.items()}
    with torch.no_grad():
        for name, value in refreshed.named_parameters():
            adapted_weights[name].copy_(value)
    np.testing.assert_allclose(floats(lora.logprobs), of_tokens(naive(adapted, 1.0)), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"top_k": 65}, InvalidArgument("top_k", "65", "0 to 64")),
        ({"model": "third"}, NotFound("model", "third", "this server has reference, first, second")),
    ],
)
def test_faults_are_named(service: ServiceProcess, fields: dict[str, object], error: PpodError) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        compute(service, **fields)
    assert vars(from_rpc_error(caught.value)) == vars(error)


def test_a_pinned_version_binds_adapters_too(service: ServiceProcess) -> None:
    request = reference_pb2.GetReferenceModelRequest(selector=common_pb2.ModelSelector(model="first", weight_version=3))
    with grpc.insecure_channel(service.target) as channel, pytest.raises(grpc.RpcError) as caught:
        reference_pb2_grpc.ReferenceServiceStub(channel).GetReferenceModel(request, timeout=30)
    assert isinstance(from_rpc_error(caught.value), FailedPrecondition)


@pytest.mark.parametrize("fault", ["missing", "pickled", "output layer"])
def test_an_adapter_that_cannot_be_served_stops_the_start(tiny_model_dir: Path, tmp_path: Path, fault: str) -> None:
    modules = ("q_proj", "lm_head") if fault == "output layer" else ("q_proj",)
    adapter = save_tiny_adapter(tmp_path / "adapter", target_modules=modules)
    if fault != "output layer":
        weights = adapter / "adapter_model.safetensors"
        weights.rename(adapter / "adapter_model.bin") if fault == "pickled" else weights.unlink()
    values = {"model": tiny_model_config(tiny_model_dir), "adapters": [{"name": "lora", "source": str(adapter)}]}
    with running_service("ppod_services.reference", tmp_path, values, until="listening") as service:
        assert service.wait(60) == 1
        assert ("lm_head" if fault == "output layer" else "adapter_model.safetensors") in service.stderr


def test_adapters_need_names_of_their_own(tmp_path: Path) -> None:
    values = {
        "listen": {"port": 1024},
        "model": {"source": "nowhere"},
        "adapters": [{"name": "reference", "source": "a"}],
    }
    ended = run_to_exit("ppod_services.reference", "--config", str(write_config(tmp_path / "c.yaml", values)))
    assert ended.returncode == 2
    assert "adapters: each name once, but reference is there twice" in ended.stderr
