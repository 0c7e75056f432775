"""Seconds of an update and peak of memory, ppod's trainer and TRL's PPOTrainer on the same samples, in turns.

usage: python update.py --trl-python PYTHON [--setting NAME] [--device NAME] [--rounds N] [--steps N] [--out DIRECTORY]

TRL holds policy, value model, reference and reward model in one process. ppod's trainer holds policy and critic; it is
measured with its value head, which is the default, and with a value model of its own, as TRL has one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from compare import REVIEWS, ROOT, describe_machine
from settings import SETTINGS, Task

from ppod_deploy.processes import CHILD_ENVIRONMENT
from ppod_models.sources import resolve

BARS = {"seconds": 1 / 3, "peak MiB": 1 / 2}


def main() -> int:
    """Measure, print the table and write update.json; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, type=Path, help="interpreter of the environment with TRL")
    parser.add_argument("--setting", choices=list(SETTINGS), default="as-they-come")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="updates of each side in a round")
    parser.add_argument("--device", default="cpu", help="of ppod's side; TRL takes a CUDA device where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-trl"))
    options = parser.parse_args()
    directory = options.out / f"update-{os.getpid()}"
    directory.mkdir(parents=True)
    found: dict[str, list[dict[str, float]]] = {"TRL": [], "ppod, value head": [], "ppod, value model": []}
    for _ in range(options.rounds):
        found["TRL"].append(run_trl(options.trl_python, options.setting, options.steps, directory))
        for critic in ("head", "model"):
            found[f"ppod, value {critic}"].append(run_ppod(options, critic, directory))
    return report(found, options.setting, directory)


def run_trl(python: Path, setting: str, steps: int, directory: Path) -> dict[str, float]:
    """TRL's figures of one round."""
    out = directory / "trl.json"
    command = [str(python), str(Path(__file__).with_name("run_trl_update.py")), setting, "--steps", str(steps)]
    command += [
        "--model",
        str(resolve(Task().model).path),
        "--reviews",
        str(REVIEWS),
        "--services",
        str(ROOT / "services"),
    ]
    environment = {**os.environ, **(CHILD_ENVIRONMENT if SETTINGS[setting].trl.tuned else {})}
    _run([*command, "--out", str(out)], environment, directory / "trl.log")
    return json.loads(out.read_text())


def run_ppod(options: argparse.Namespace, critic: str, directory: Path) -> dict[str, float]:
    """ppod's figures of one round, on the samples of TRL's."""
    out = directory / f"ppod-{critic}.json"
    command = [sys.executable, str(Path(__file__).with_name("run_update.py")), options.setting]
    command += ["--steps", str(options.steps), "--device", options.device, "--critic", critic]
    command += ["--rollouts", str(directory / "rollouts.npz"), "--out", str(out)]
    roots = [str(ROOT / name) for name in ("protos", "services", "trainer")]
    environment = {**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(roots)}
    _run(command, environment, directory / f"ppod-{critic}.log")
    return json.loads(out.read_text())


def report(found: dict[str, list[dict[str, float]]], setting: str, directory: Path) -> int:
    """Print and write the table."""
    rows: dict[str, dict[str, float]] = {}
    for side, rounds in found.items():
        rows[side] = {
            "seconds": statistics.median(one["median"] for one in rounds),
            "peak MiB": max(one["peak_mib"] for one in rounds),
        }
    met = True
    for side, row in rows.items():
        text = "  ".join(
            f"{name} {value:9.2f} ({value / rows['TRL'][name]:.2f} of TRL's)" for name, value in row.items()
        )
        print(f"{side:20} {text}")
    for name, bar in BARS.items():
        ratio = rows["ppod, value head"][name] / rows["TRL"][name]
        met &= ratio <= bar
        print(f"{'ok  ' if ratio <= bar else 'MISS'} {name} of an update over TRL's: {ratio:.2f} (bar <= {bar:.2f})")
    content = {"setting": setting, "machine": describe_machine(), "rows": rows, "rounds": found}
    (directory / "update.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if met else 1


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("wb") as stream:
        subprocess.run(command, check=True, stdout=stream, stderr=stream, env=environment)


if __name__ == "__main__":
    sys.exit(main())
