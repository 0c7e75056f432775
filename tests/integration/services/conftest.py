"""A reward service with models, functions and what is composed of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.processes import ServiceProcess, running_service
from support.services import tiny_model_config
from support.tiny_classifiers import save_decoder, save_encoder, save_process_model


@dataclass(frozen=True)
class Zoo:
    """Every kind of reward in one service, and the directories of its models."""

    service: ServiceProcess
    heads: dict[str, Path]
    trunk: Path
    decoder: Path
    encoder: Path
    process: Path


@pytest.fixture(scope="session")
def zoo(tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    directory = tmp_path_factory.mktemp("zoo")
    decoder = save_decoder(directory / "decoder")
    encoder = save_encoder(directory / "encoder")
    process = save_process_model(directory / "process")
    trunk = tiny_model_config(tiny_model_dir)
    scaled = {"normalization": {"mean": 0.25, "std": 2.0}, "clip": {"low": -0.1, "high": 0.1}}
    rewards = [
        {"name": "first", "model": trunk, "head": str(tiny_heads["first"])},
        {"name": "second", "model": trunk, "head": str(tiny_heads["second"])},
        {"name": "scaled", "model": trunk, "head": str(tiny_heads["first"]), **scaled},
        {"name": "decoder", "kind": "sequence_classification", "model": tiny_model_config(decoder)},
        {"name": "encoder", "kind": "sequence_classification", "model": tiny_model_config(encoder)},
        {
            "name": "process",
            "kind": "token_classification",
            "model": tiny_model_config(process),
            "steps": {"separator": "\n\n"},
        },
        {"name": "length", "kind": "function", "function": "length", "parameters": {"maximum": 3}},
        {"name": "answer", "kind": "function", "function": "exact_answer"},
        {
            "name": "backtracking",
            "kind": "function",
            "function": "regular_expression",
            "parameters": {"pattern": "(a+)+$", "mode": "full"},
            "timeout_s": 1.0,
        },
        {"name": "scripted", "kind": "function", "function": "test_scripted", "timeout_s": 2.0, "workers": 2},
        {"name": "ensemble", "kind": "ensemble", "members": ["first", "second", "decoder"], "pessimism": 0.5},
        {
            "name": "sum",
            "kind": "sum",
            "terms": [
                {"reward": "ensemble", "weight": 2.0},
                {"reward": "length", "weight": 0.25},
                {"reward": "first", "weight": -1.0},
            ],
            "clip": {"low": -50},
        },
        {"name": "retokenised", "kind": "sum", "terms": [{"reward": "first", "weight": 0}, {"reward": "encoder"}]},
        {"name": "stepwise", "kind": "sum", "terms": [{"reward": "first"}, {"reward": "process", "weight": 3}]},
        {"name": "fragile", "kind": "sum", "terms": [{"reward": "first"}, {"reward": "scripted"}]},
    ]
    values = {"rewards": rewards, "limits": {"max_request_sequences": 64}}
    with running_service("ppod_services.reward", directory, values) as service:
        yield Zoo(service, tiny_heads, tiny_model_dir, decoder, encoder, process)
