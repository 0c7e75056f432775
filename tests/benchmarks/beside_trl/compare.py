"""Measures ppod and TRL's PPOTrainer on the same task, one after the other in turns, on this machine.

usage: python compare.py --trl-python PYTHON [--settings NAME ...] [--rounds N] [--steps N] [--out DIRECTORY]

Each round runs some steps of TRL, then as many of ppod, so that a machine that grows slower or faster meets both. Both
start from the same weights, prompts, reward model and hyperparameters; ppod runs as `ppod run` starts it: four
processes over gRPC. Writes result.json and result.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
import yaml
from settings import SETTINGS, Setting, Side, Task

from ppod_deploy.processes import CHILD_ENVIRONMENT
from ppod_models.sources import resolve

ROOT = Path(__file__).resolve().parents[3]
REVIEWS = ROOT / "trainer/ppod_trainer/data/movie_review_ratings.tsv"
BUSY_LOAD = 0.7
"""Load average above which something else was running when the measurement began."""

PHASES = ("generate", "score_and_reference", "score", "reference", "old_logprobs", "update", "push")


class Machine(TypedDict):
    """Where it was measured."""

    cpu: str
    cores: int
    device: str
    load_before: float
    versions: dict[str, str]


@dataclass(slots=True)
class Measured:
    """Seconds of each step, by side, of one setting."""

    setting: Setting
    trl: list[float] = field(default_factory=list)
    ppod: list[float] = field(default_factory=list)
    ppod_phases: dict[str, list[float]] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """Medians and their ratio."""
        trl, ppod = statistics.median(self.trl), statistics.median(self.ppod)
        return {
            "setting": asdict(self.setting),
            "trl_seconds_per_step": round(trl, 2),
            "ppod_seconds_per_step": round(ppod, 2),
            "ratio": round(trl / ppod, 2),
            "ppod_phase_seconds": {phase: round(statistics.median(s), 2) for phase, s in self.ppod_phases.items()},
            "trl_seconds": self.trl,
            "ppod_seconds": self.ppod,
        }


def main() -> None:
    """Measure all settings and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, type=Path, help="interpreter of the environment with TRL")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-trl"))
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    model_dir = resolve(Task().model).path
    results: list[Measured] = []
    for name in options.settings:
        measured = Measured(SETTINGS[name])
        for number in range(options.rounds):
            directory = out / f"{name}-{os.getpid()}-{number}"
            measured.trl += run_trl(options.trl_python, measured.setting, options.steps, model_dir, directory, machine)
            run_ppod(measured, options.steps, directory)
            print(
                f"{name}, round {number + 1}: TRL {measured.trl[-1]:.1f} s, ppod {measured.ppod[-1]:.1f} s", flush=True
            )
        results.append(measured)
        write_results(out, machine, results)
    print((out / "result.md").read_text())


def run_trl(
    python: Path, setting: Setting, steps: int, model_dir: Path, directory: Path, machine: Machine
) -> list[float]:
    """Seconds of each of TRL's steps."""
    result_file = directory / "trl.json"
    directory.mkdir(parents=True)
    command = [str(python), str(Path(__file__).with_name("run_trl.py")), setting.name, "--steps", str(steps)]
    command += ["--model", str(model_dir), "--reviews", str(REVIEWS), "--services", str(ROOT / "services")]
    with (directory / "trl.log").open("wb") as log:
        # What ppod's launcher gives its processes helps TRL as well; without it, TRL runs as its users start it.
        environment = {**os.environ, **(CHILD_ENVIRONMENT if setting.trl.tuned else {})}
        subprocess.run([*command, "--out", str(result_file)], check=True, stdout=log, stderr=log, env=environment)
    result = json.loads(result_file.read_text())
    machine["versions"].update({f"TRL's {name}": version for name, version in result["versions"].items()})
    return result["seconds"]


def run_ppod(measured: Measured, steps: int, directory: Path) -> None:
    """Add the seconds of each of ppod's steps and their phases."""
    run_dir = directory / "ppod"
    start_ppod(run_values(measured.setting, steps, run_dir), directory)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record: dict[str, float] = json.loads(line)
        if "seconds/step" not in record:
            continue
        measured.ppod.append(round(record["seconds/step"], 3))
        for phase in PHASES:
            if f"seconds/{phase}" in record:
                measured.ppod_phases.setdefault(phase, []).append(record[f"seconds/{phase}"])


def start_ppod(values: Mapping[str, object], directory: Path) -> None:
    """Run `ppod run` to its end; its log goes into the directory."""
    run_file = directory / "ppod.yaml"
    run_file.write_text(yaml.safe_dump(values, sort_keys=False))
    roots = [str(ROOT / name) for name in ("protos", "services", "trainer", "deploy")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    command = [sys.executable, "-m", "ppod_deploy", "run", "--config", str(run_file)]
    with (directory / "ppod.log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def run_values(setting: Setting, steps: int, run_dir: Path, task: Task = Task()) -> dict[str, dict[str, object]]:  # noqa: B008 - frozen
    """ppod's run file for a setting."""
    model = {"source": task.model, "dtype": setting.ppod.dtype, "attention": setting.ppod.attention}
    scoring = {**model, "threads": 1}  # reward and reference work at the same time
    reward_model = {"name": "reviews-reward", "model": scoring, "head": task.head}
    return {
        "services": {
            "reward": {"listen": {"port": 51051}, "rewards": [reward_model]},
            "reference": {"listen": {"port": 51052, "admin_port": 51062}, "model": scoring},
            "generation": {"listen": {"port": 51053, "admin_port": 51063}, "model": model},
        },
        "trainer": {
            "run_dir": str(run_dir),
            "seed": setting.seed,
            "steps": steps,
            "policy": model,
            "prompts": {"first_tokens": setting.prompt_tokens, "heldout": 2},
            "rollout": {
                "batch_size": setting.batch_size,
                "max_tokens": setting.response_tokens,
                "temperature": setting.temperature,
            },
            "kl": {"coefficient": setting.kl_coefficient},
            "ppo": {"epochs": setting.epochs, "minibatches": setting.minibatches},
            "optimizer": {
                "learning_rate": setting.learning_rate,
                "value_learning_rate": setting.ppod_value_learning_rate,
            },
            "metrics": {"port": None, "tensorboard": False},
        },
    }


def describe_machine() -> Machine:
    """CPU, cores, CUDA device, load and ppod's versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "grpcio")},
    }


def describe_side(side: Side) -> str:
    """For the table."""
    return f"{side.dtype}, {side.attention} attention{', tuned environment' if side.tuned else ''}"


def write_results(out: Path, machine: Machine, results: list[Measured]) -> None:
    """Write result.json and result.md."""
    summaries = [measured.summary() for measured in results]
    (out / "result.json").write_text(json.dumps({"machine": machine, "results": summaries}, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [
        f"| {measured.setting.name} | {measured.setting.batch_size} x ({measured.setting.prompt_tokens} + "
        f"{measured.setting.response_tokens}) | {measured.setting.epochs} x {measured.setting.minibatches} | "
        f"{describe_side(measured.setting.trl)} | {describe_side(measured.setting.ppod)} | "
        f"{statistics.median(measured.trl):.1f} | {statistics.median(measured.ppod):.1f} | "
        f"{statistics.median(measured.trl) / statistics.median(measured.ppod):.2f} |"
        for measured in results
    ]
    busy = machine["load_before"] > BUSY_LOAD
    table = [
        *(["**The machine was busy with other work: these figures tell nothing.**", ""] if busy else []),
        f"{machine['cpu']}, {machine['cores']} cores; load before {machine['load_before']}; {versions}",
        "",
        "| setting | samples x (prompt + response tokens) | epochs x minibatches | TRL computes in | "
        "ppod computes in | TRL, s a step | ppod, s a step | TRL / ppod |",
        "|---|---|---|---|---|---:|---:|---:|",
        *rows,
    ]
    (out / "result.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
