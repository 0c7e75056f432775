"""Ranks that learn from random rollouts, and how what they learnt is compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import write_config
from support.ranks import start_ranks, wait_for_ranks
from support.services import tiny_model_config

Figures = list[dict[str, object]]
Learned = tuple[Figures, dict[str, torch.Tensor]]
LEARNING = "support.ranked_learning"


def learn(
    directory: Path,
    model_dir: Path,
    ranks: int,
    name: str,
    ppo: Mapping[str, object] | None = None,
    *,
    until: int = 3,
    environments: Sequence[Mapping[str, str]] = (),
    **changes: object,
) -> Learned:
    """Let this many ranks learn; figures of each step, and the final weights.

    Args:
        directory: takes all that they write.
        model_dir: the tiny model.
        ranks: how many.
        name: of the run.
        ppo: changes to its section.
        until: the last step.
        environments: more variables for each rank.
        changes: other sections of the configuration.
    """
    values = {
        "run_dir": str(directory / name),
        "policy": tiny_model_config(model_dir),
        "steps": 3,
        # Three minibatches of 4, 4 and 3 samples: the fourth of four ranks has none in the last.
        "rollout": {"batch_size": 11},
        "ppo": {"epochs": 2, "minibatches": 3, **(ppo or {})},
        "advantages": {"bootstrap_truncated": True},
        "optimizer": {"learning_rate": 1e-3},
        "ranks": {"timeout_s": 60},
        **changes,
    }
    (directory / name).mkdir(exist_ok=True)
    config = write_config(directory / f"{name}.yaml", values)
    arguments = ("--config", str(config), "--until", str(until))
    processes = start_ranks(
        LEARNING, *arguments, ranks=ranks, directory=directory, name=name, environments=environments
    )
    for code, _, stderr in wait_for_ranks(processes, 100):
        assert code == 0, stderr
    figures = json.loads((directory / name / "figures.json").read_text())
    return figures, load_file(directory / name / "model.safetensors")


def assert_close_figures(found: Figures, expected: Figures) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if name not in ("seconds", "peak_bytes"):
                assert torch.tensor(mine[name]).double().numpy() == pytest.approx(
                    torch.tensor(value).double().numpy(), rel=1e-3, abs=1e-5
                ), name


def assert_close_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
