"""A real run that is provoked: all of its rewards are equal, which is said, exported, and stops it when told to."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.processes import free_ports
from support.tiny_head import save_tiny_head

from .conftest import System, records_of, running_system, wait_for_step


@pytest.fixture(scope="module")
def constant(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Services whose reward model's head is all zeros: every text scores the same."""
    directory = tmp_path_factory.mktemp("constant")
    head = save_tiny_head(tiny_model_dir, directory / "reward", name="reward", seed=0)
    for path in head.glob("*.safetensors"):
        save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    with running_system(tiny_model_dir, directory / "services", {"reward": str(head)}) as made:
        yield made


def changes(system: System) -> dict[str, object]:
    services = dict(system.config("x")["services"])  # type: ignore[call-overload]
    return {"services": {**services, "judge_model": None}, "steps": 5}


def test_equal_rewards_stop_a_run_that_can_be_resumed(constant: System) -> None:
    config = constant.config("stopped", watch={"stop": ["all_equal_rewards"], "steps": 3}, **changes(constant))
    result = constant.train(config)
    # Not 1, after which a Job would start it again, to go on into the trouble.
    assert result.returncode == 3
    assert "TroubleError: failed after step 3; resume from" in result.stdout
    assert "step 3: watch.stop names all_equal_rewards: all outcomes of a step are" in result.stderr
    run_dir = Path(str(config["run_dir"]))
    assert [record["trouble/all_equal_rewards"] for record in records_of(run_dir) if "score/mean" in record] == [
        0,
        0,
        1,
    ]
    # Whoever asks why looks there.
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads(next(run_dir.glob("checkpoints/*/trainer.json")).read_text())
    assert kept["step"] == 3
    # Told to go on, it goes on from there.
    resumed = constant.train({**config, "watch": {"steps": 3}, "resume": True})
    assert resumed.returncode == 0, resumed.stderr
    assert [record["step"] for record in records_of(run_dir) if "score/mean" in record] == [1, 2, 3, 4, 5]
    told = "trouble: all_equal_rewards in 3 of 5 steps, first in step 3, last in step 5"
    assert told in (run_dir / "report.txt").read_text().splitlines()


def test_trouble_is_exported(constant: System) -> None:
    (port,) = free_ports(1)
    metrics = {"port": port, "tensorboard": False}
    config = constant.config("exported", **{**changes(constant), "steps": 300, "metrics": metrics})
    process = constant.start(config)
    try:
        wait_for_step(process, Path(str(config["run_dir"])), 4)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
    finally:
        process.kill()
        process.wait(timeout=30)
    assert 'ppod_trouble{kind="all_equal_rewards"} 1.0' in lines
    # Not dead_gradients: without rewards only rounding is left to learn from, and some processors have none.
    assert 'ppod_trouble{kind="kl_blow_up"} 0.0' in lines
