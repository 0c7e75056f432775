"""Runs that learn to copy, from a random policy, through real services."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.copying import save_copying_model
from support.forked import ForkedProcess
from support.processes import ServiceProcess, running_service, start_module, write_config
from support.services import tiny_model_config

Config = dict[str, object]

IN_LOSS: Config = {"placement": "loss", "estimator": "k3", "coefficient": 0.001}
GROUPS: Config = {"samples_per_prompt": 8}


@dataclass(frozen=True)
class CopyingSystem:
    """Reference and generation with the random model; the environment pays."""

    reference: ServiceProcess
    generation: ServiceProcess
    model_dir: Path
    directory: Path

    def config(self, name: str, **changes: Mapping[str, object] | int) -> Config:
        """A run; `changes` replace top-level keys, sections key by key."""
        values: Config = {
            "run_dir": str(self.directory / name),
            "steps": 40,
            "policy": tiny_model_config(self.model_dir),
            "services": {
                "reference": self.reference.target,
                "generation": self.generation.target,
                "reference_admin": self.reference.admin_target,
                "generation_admin": self.generation.admin_target,
                "recovery_timeout_s": 0,
            },
            "environment": {"name": "test_copying", "episodes": 1500, "max_turns": 1},
            "prompts": {"heldout": 100},
            "rollout": {"batch_size": 256, "max_tokens": 3},
            "rewards": {"model": False},
            "kl": {"coefficient": 0.0},
            "ppo": {"epochs": 2, "minibatches": 8},
            "optimizer": {"learning_rate": 0.003, "final_fraction": 0.3},
            "metrics": {"port": None, "tensorboard": False},
        }
        for key, change in changes.items():
            section = values.get(key)
            values[key] = {**section, **change} if isinstance(section, dict) and isinstance(change, Mapping) else change
        return values

    def start(self, config: Config) -> ForkedProcess:
        """Start a trainer."""
        name = Path(str(config["run_dir"])).name
        path = write_config(self.directory / f"{name}.yaml", config)
        return start_module("ppod_trainer", "--config", str(path), directory=self.directory, name=name)

    def train(self, config: Config, timeout_s: float = 280) -> str:
        """Run a trainer to its end, which must be a good one; its output."""
        process = self.start(config)
        stdout, stderr = process.communicate(timeout=timeout_s)
        assert process.wait() == 0, stderr
        return stdout


@contextmanager
def copying_system(directory: Path, *, seed: int = 0) -> Iterator[CopyingSystem]:
    """Start the services, with a random model of this seed."""
    model_dir = save_copying_model(directory / "model", seed=seed)
    model = tiny_model_config(model_dir)
    with ExitStack() as stack:
        reference, generation = (
            stack.enter_context(running_service(f"ppod_services.{name}", directory, {"model": model}))
            for name in ("reference", "generation")
        )
        yield CopyingSystem(reference, generation, model_dir, directory)


def whole_words(run_dir: Path) -> dict[int, float]:
    """Share of the held-out words that were copied whole, by the step after which they were asked for."""
    return {
        int(path.stem.removeprefix("step_")): _right(path) for path in sorted((run_dir / "samples").glob("*.jsonl"))
    }


def _right(path: Path) -> float:
    scores = [json.loads(line)["score"] for line in path.read_text().splitlines()]
    # Thirds add up to 1 exactly, but for the rounding of a sum of floats.
    return sum(score > 0.999 for score in scores) / len(scores)
