"""What is written of a policy, and references that are kept and served."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ppod import FailedPrecondition, Unavailable
from ppod.client import Pin
from ppod_models.loading import load_causal_lm, load_tokenizer
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.config import TrainerConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.quantisation import dense_copy
from ppod_trainer.reference_policy import ReferencePolicy, save_policy
from support.capped_models import gemma2
from support.pushed_runs import Generation, run_of
from support.tiny_model import build_model, save_tiny_model

CPU = torch.device("cpu")


def saved_with_defaults(directory: Path, defaults: dict[str, object]) -> PreTrainedModel:
    """A model whose base tells these defaults of generation."""
    path = save_tiny_model(directory) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **defaults}))
    return load_causal_lm(directory, device=CPU, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:.*generation flags are not valid")
def test_a_final_model_keeps_defaults_of_generation_that_contradict_each_other(tmp_path: Path) -> None:
    """As those of many models on the hub: transformers loads them, and raises where they are to be saved."""
    base = tmp_path / "base"
    model = saved_with_defaults(base, {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [256, 258]})
    run = run_of(
        tmp_path / "run",
        Generation(),
        TrainerState(1, 1, 0, ""),
        {},
        learner=SimpleNamespace(adapter=None, whole_model=lambda: model),
        tokenizer=load_tokenizer(base),
    )
    found = AutoModelForCausalLM.from_pretrained(run.save_final_model())
    defaults = found.generation_config
    assert (defaults.temperature, defaults.top_p, defaults.eos_token_id) == (0.9, 0.6, [256, 258])
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert model.generation_config.temperature == 0.9


def test_a_final_adapter_is_whole_also_where_the_process_ends_as_it_is_written(tmp_path: Path) -> None:
    class Ended(BaseException):
        pass

    class Adapter:
        killed = False

        def save(self, directory: Path, tensors: str, base: str) -> None:
            (directory / "adapter_config.json").write_text(base)
            if self.killed:
                raise Ended
            (directory / "adapter_model.safetensors").write_text(tensors)

    adapter, model = Adapter(), saved_with_defaults(tmp_path / "base", {})
    learner = SimpleNamespace(adapter=adapter, whole_model=lambda: model, adapter_weights=lambda: "weights")
    run = run_of(
        tmp_path / "run",
        Generation(),
        TrainerState(1, 1, 0, ""),
        {"policy": {"source": "first"}},
        learner=learner,
        tokenizer=load_tokenizer(tmp_path / "base"),
    )
    run.save_final_model()
    adapter.killed, run.config = (
        True,
        TrainerConfig.model_validate({"policy": {"source": "second"}, "run_dir": run.config.run_dir}),
    )
    with pytest.raises(Ended):
        run.save_final_model()
    found = tmp_path / "run" / "final_adapter"
    assert {path.name: path.read_text() for path in found.iterdir()} == {
        "adapter_config.json": "first",
        "adapter_model.safetensors": "weights",
    }


def test_other_defaults_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    model = saved_with_defaults(tmp_path / "base", {"temperature": 0.7, "do_sample": True, "eos_token_id": [256, 258]})
    model.save_pretrained(tmp_path / "expected")
    save_policy(model, tmp_path / "found")
    expected, found = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("expected", "found")
    )
    assert found == expected


def test_what_is_trained_on_a_quantised_base_ends_where_the_base_ends(tmp_path: Path) -> None:
    """Its final model is saved by what the base is without quantisation."""
    model = saved_with_defaults(tmp_path, {"eos_token_id": [256, 258]})
    found = dense_copy(tmp_path, attention="sdpa")
    assert found.generation_config.to_dict() == model.generation_config.to_dict()
    assert found.generation_config.eos_token_id == [256, 258]
    (tmp_path / "generation_config.json").unlink()
    assert dense_copy(tmp_path, attention="sdpa").generation_config.eos_token_id == 256, "as its configuration has it"


class Reference:
    """The reference service and its weights, as what serves a reference asks them; remembers what was pushed."""

    def __init__(self) -> None:
        self.pin = Pin()
        self.serves = 0
        self.away = False
        self.pushed: dict[str, torch.Tensor] = {}

    def describe(self) -> object:
        if self.away:
            raise Unavailable("gone")
        if self.pin.weight_version not in (None, self.serves):
            raise FailedPrecondition("weight_version", str(self.serves), str(self.pin.weight_version))
        return SimpleNamespace(limits=SimpleNamespace(dtype="float32"))

    def serving_versions(self) -> set[int]:
        return {self.serves}

    def push(self, model: PreTrainedModel, dtype: torch.dtype, weight_version: int) -> None:
        self.pushed = {name: tensor.to(dtype).clone() for name, tensor in model.state_dict().items()}
        assert weight_version > self.serves
        self.serves = weight_version


def served(service: Reference, directory: Path, model: PreTrainedModel) -> ReferencePolicy:
    """A reference of version 4, in service."""
    connections = SimpleNamespace(reference=service, reference_weights=service)
    reference = ReferencePolicy(directory / "reference", cast(Any, connections))
    reference.keep(model, 4, ())
    reference.serve(4)
    return reference


def test_a_reference_whose_attention_is_capped_is_served(tmp_path: Path) -> None:
    """Such a policy is trained with eager attention; of its reference the weights alone are read here."""
    model, service = gemma2(), Reference()
    served(service, tmp_path, model)
    assert service.pin.weight_version == 4
    assert all(torch.equal(service.pushed[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("serves", "again"), [(0, 4), (5, 6)], ids=["started again", "its commit was not heard of"])
def test_a_reference_with_another_version_than_the_pinned_one_is_given_its_weights(
    tmp_path: Path, serves: int, again: int
) -> None:
    service = Reference()
    reference = served(service, tmp_path, build_model())
    service.serves = serves
    assert reference.lost()
    reference.serve(4)
    assert (service.serves, service.pin.weight_version) == (again, again)
    assert not reference.lost()


def test_a_reference_that_is_away_stays_pinned(tmp_path: Path) -> None:
    service = Reference()
    reference = served(service, tmp_path, build_model())
    service.away = True
    with pytest.raises(WeightPushError, match="gone"):
        reference.serve(4)
    assert service.pin.weight_version == 4
