"""Runs that train an adapter, on a base in full or in four bits, and runs with a critic of their own."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ppod import ReferenceClient
from support.optional import needs_bitsandbytes
from support.services import tiny_model_config
from support.tiny_classifiers import save_decoder
from support.tiny_head import save_tiny_head
from support.tiny_model import build_model
from support.weight_checks import assert_serves

from .conftest import System, records_of, running_system


@pytest.fixture(scope="module")
def system(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Generation and reference begin with other weights than the trainer's: what they have must come from it."""
    directory = tmp_path_factory.mktemp("system")
    other = directory / "other"
    build_model(seed=9).save_pretrained(other)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_bytes((tiny_model_dir / file).read_bytes())
    heads = {name: str(save_tiny_head(other, directory / name, name=name, seed=1)) for name in ("reward", "judge")}
    with running_system(other, directory, heads) as made:
        yield System(made.reward, made.reference, made.generation, tiny_model_dir, directory)


def versions_of(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["policy/version"] for record in map(json.loads, lines) if "policy/version" in record]


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_an_adapter_is_trained_pushed_alone_and_saved(system: System, quantization: str) -> None:
    run_dir = system.directory / f"lora-{quantization}"
    lora = {"rank": 4, "alpha": 8, "quantization": quantization}
    policy = {**tiny_model_config(system.model_dir), "lora": lora}
    done = system.train(system.config(run_dir.name, policy=policy))
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "final_model")
    # One version each step, but for the first push: the base goes before it.
    versions = versions_of(run_dir)
    assert [later - earlier for earlier, later in itertools.pairwise(versions)] == [1.0] * 3
    assert_serves(system.generation, int(versions[-1]), merged)
    assert all(record["policy/first_ratio_error"] == 0 for record in records_of(run_dir) if "loss/policy" in record)
    gaps = [record["sampler/gap_max"] for record in records_of(run_dir) if "sampler/gap_max" in record]
    assert max(gaps) < 1e-4, "the sampler is the merged adapter"
    if quantization == "none":
        base = AutoModelForCausalLM.from_pretrained(system.model_dir)
        adapted = PeftModel.from_pretrained(base, run_dir / "final_adapter").merge_and_unload()
        for name, parameter in adapted.named_parameters():
            torch.testing.assert_close(parameter, merged.get_parameter(name), atol=1e-6, rtol=1e-5)
    changed = [
        name
        for name, parameter in build_model().named_parameters()
        if not torch.equal(parameter, merged.get_parameter(name))
    ]
    assert changed
    assert all("proj" in name for name in changed)


@needs_bitsandbytes
def test_the_reference_of_a_quantised_policy_is_what_its_base_stands_for(system: System) -> None:
    """Before the first update policy and reference are the same model: the KL between them is rounding."""
    policy = {**tiny_model_config(system.model_dir), "lora": {"rank": 4, "quantization": "nf4"}}
    config = system.config("qlora-reference", policy=policy, steps=1, optimizer={"learning_rate": 1e-12})
    done = system.train(config)
    assert done.returncode == 0, done.stderr
    (record,) = [one for one in records_of(system.directory / "qlora-reference") if "kl/reference" in one]
    assert abs(record["kl/reference"]) < 1e-4
    with ReferenceClient(system.reference.target) as reference:
        assert reference.describe().state.weight_version > 0


def test_a_resumed_adapter_ends_where_it_did_before(system: System) -> None:
    policy = {**tiny_model_config(system.model_dir), "lora": {"rank": 4}}
    config = system.config("resumed", policy=policy, checkpoint={"interval": 2, "keep": 2})
    run_dir, ends = system.directory / "resumed", []
    for resume in (False, True):
        done = system.train({**config, "resume": resume})
        assert done.returncode == 0, done.stderr
        ends.append(AutoModelForCausalLM.from_pretrained(run_dir / "final_model").state_dict())
        # Back to the middle.
        shutil.rmtree(sorted((run_dir / "checkpoints").glob("step_*"))[-1])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_critic_of_its_own_warms_up_before_the_policy_moves(system: System, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "critic", seed=3)
    critic = {"kind": "model", "source": str(source), "warm_up_steps": 2}
    kl = {"coefficient": 0.1, "adaptive": {"target": 100.0, "horizon": 100}}
    done = system.train(system.config("critic", critic=critic, kl=kl))
    assert done.returncode == 0, done.stderr
    records = [record for record in records_of(system.directory / "critic") if "loss/value" in record]
    assert [record["critic/warm_up"] for record in records] == [1.0, 1.0, 0.0, 0.0]
    # A policy that stands still has a ratio of 1 in every minibatch.
    assert [record["policy/approx_kl"] == 0 for record in records] == [True, True, False, False]
    assert all(record["policy/grad_norm"] > 0 for record in records)
    assert records[1]["loss/value"] < records[0]["loss/value"]
    # No coefficient moves a policy that stands still: 8 samples of a horizon of 100 take 0.2 * 8 / 100 off it later.
    assert [record["kl/coefficient"] for record in records] == pytest.approx([0.1, 0.1, 0.1, 0.1 * 0.984])
