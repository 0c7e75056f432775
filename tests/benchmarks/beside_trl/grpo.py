"""Measures ppod's GRPO and TRL's GRPOTrainer on verified answers, one after the other in turns, on this machine.

usage: python grpo.py --trl-python PYTHON [--seeds N ...] [--steps N] [--trl-dtype NAME] [--speed-steps N]
    [--out DIRECTORY]

Both start from the same weights and learn sums from the same prompts, rewards and hyperparameters, those of ppod's run
file sums-cpu.yaml; ppod runs as `ppod run` starts it: four processes over gRPC. Each seed trains both; TRL's own
default is autocast to bfloat16. One script samples what each model answers to the prompts that were held out. For the
speed alone TRL also runs some steps with ppod's precision and process settings. Writes result.json and result.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compare import BUSY_LOAD, ROOT, Machine, describe_machine, start_ppod

from ppod_deploy.defaults import CONFIGS
from ppod_deploy.processes import CHILD_ENVIRONMENT
from ppod_deploy.run_config import parse_run, read_run_values
from ppod_models.chat_template import render_chat
from ppod_models.loading import load_tokenizer
from ppod_models.sources import resolve
from ppod_trainer.prompts import Prompt, load_prompts

RUN_FILE = CONFIGS / "sums-cpu.yaml"


@dataclass(frozen=True, slots=True)
class Trained:
    """What one side did with one seed.

    Attributes:
        side: "ppod" or "TRL", and how it computes.
        seed: of the run.
        seconds: of each step.
        rewards: mean of each step's samples.
        right: share of right answers to the held-out prompts, at temperature 1; None where nobody asked.
    """

    side: str
    seed: int
    seconds: list[float]
    rewards: list[float]
    right: float | None


class Bench:
    """Runs both sides.

    Args:
        python: of TRL's environment.
        out: where everything goes.
        steps: of each run.
    """

    def __init__(self, python: Path, out: Path, steps: int) -> None:
        self._python = python
        self._out = out
        self._values = read_run_values(RUN_FILE)
        self._trainer = parse_run(self._values, RUN_FILE.name).trainer
        self._model = resolve(self._trainer.policy.source).path
        self._steps = steps
        self.versions: dict[str, str] = {}

    @property
    def model(self) -> Path:
        """The weights that both begin with."""
        return self._model

    def ppod(self, seed: int) -> Trained:
        """Train by `ppod run`, and judge the final model."""
        run_dir = self._out / f"ppod-{seed}"
        trainer = self._values["trainer"] | {"run_dir": str(run_dir), "seed": seed, "steps": self._steps}
        start_ppod({**self._values, "trainer": trainer}, self._out)
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = [one for one in records if "seconds/step" in one]
        return Trained(
            "ppod",
            seed,
            [round(one["seconds/step"], 3) for one in steps],
            [round(one["score/mean"], 4) for one in steps],
            self.judge(run_dir / "final_model", f"ppod-{seed}"),
        )

    def trl(self, seed: int, dtype: str, steps: int, *, tuned: bool) -> Trained:
        """Train by TRL; the model is judged where it made all steps."""
        name = f"trl-{dtype}-{seed}{'-tuned' if tuned else ''}"
        (directory := self._out / name).mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **(CHILD_ENVIRONMENT if tuned else {})}
        options = ["--seed", str(seed), "--dtype", dtype, "--out", str(directory)]
        self._run("train", self._task(steps), self._model, options, name, environment)
        result = json.loads((directory / "trl.json").read_text())
        self.versions |= {f"TRL's {name}": version for name, version in result["versions"].items()}
        right = self.judge(directory / "model", name) if steps == self._steps else None
        side = f"TRL, {dtype}{', with the process settings of ppod' if tuned else ''}"
        return Trained(side, seed, result["seconds"], result["rewards"], right)

    def judge(self, model: Path, name: str) -> float:
        """The share of right answers of a model to the held-out prompts."""
        file = self._out / f"{name}-judged.json"
        self._run("judge", self._task(self._steps), model, ["--out", str(file)], f"{name}-judge", dict(os.environ))
        return json.loads(file.read_text())["right"]

    def _run(
        self, what: str, task: Path, model: Path, options: Sequence[str], name: str, environment: dict[str, str]
    ) -> None:
        command = [str(self._python), str(Path(__file__).with_name("run_trl_grpo.py")), what, str(task)]
        with (self._out / f"{name}.log").open("wb") as log:
            subprocess.run(
                [*command, "--model", str(model), *options], check=True, stdout=log, stderr=log, env=environment
            )

    def _task(self, steps: int) -> Path:
        """What TRL is given, as a file."""
        config = self._trainer
        tokenizer = load_tokenizer(self._model)
        prompts = load_prompts(
            config.prompts.model_copy(update={"path": ROOT / str(config.prompts.path)}),
            tokenizer.encode,
            lambda turns: render_chat(tokenizer, turns, open_turn=True),
        )
        task = {
            "training": [_record(prompt) for prompt in prompts.training],
            "heldout": [_record(prompt) for prompt in prompts.heldout],
            "steps": steps,
            "batch_size": config.rollout.batch_size,
            "samples_per_prompt": config.rollout.samples_per_prompt,
            "max_tokens": config.rollout.max_tokens,
            "minibatches": config.ppo.minibatches,
            "learning_rate": config.optimizer.learning_rate,
            "warmup_steps": config.optimizer.warmup_steps,
            "kl_coefficient": config.kl.coefficient,
        }
        file = self._out / f"task-{steps}.json"
        file.write_text(json.dumps(task))
        return file


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, type=Path, help="interpreter of the environment with TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trl-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--speed-steps", type=int, default=4, help="steps of TRL with ppod's settings")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-grpo"))
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    bench = Bench(options.trl_python, out, options.steps)
    found: list[Trained] = []
    before = bench.judge(bench.model, "before")
    for seed in options.seeds:
        for one in (bench.trl(seed, options.trl_dtype, options.steps, tuned=False), bench.ppod(seed)):
            found.append(one)
            seconds = statistics.median(one.seconds)
            print(f"seed {seed}, {one.side}: {before:.0%} -> {one.right:.0%} right, {seconds:.1f} s a step", flush=True)
    found.append(bench.trl(options.seeds[0], "bfloat16", options.speed_steps, tuned=True))
    machine["versions"].update(bench.versions)
    write_results(out, machine, before, found)
    print((out / "result.md").read_text())


def write_results(out: Path, machine: Machine, before: float, found: Sequence[Trained]) -> None:
    """Write result.json and result.md."""
    result = {"machine": machine, "right_before": before, "runs": [asdict(one) for one in found]}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    rows: list[str] = []
    for side in dict.fromkeys(one.side for one in found):
        runs = [one for one in found if one.side == side]
        seconds = statistics.median([each for one in runs for each in one.seconds])
        shares = " ".join(f"{one.right:.0%}" for one in runs if one.right is not None) or "-"
        rows.append(f"| {side} | {seconds:.1f} | {shares} |")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    busy = "**The machine was busy with other work: the seconds tell nothing.**"
    table = [
        *([busy, ""] if machine["load_before"] > BUSY_LOAD else []),
        f"{machine['cpu']}, {machine['cores']} cores; load before {machine['load_before']}; {versions}",
        "",
        f"Right answers to held-out sums before training: {before:.0%}",
        "",
        "| side | s a step, median | right after training, by seed |",
        "|---|---:|---:|",
        *rows,
    ]
    (out / "result.md").write_text("\n".join(table) + "\n")


def _record(prompt: Prompt) -> dict[str, object]:
    return {"messages": [asdict(turn) for turn in prompt.turns], "reference": prompt.reference}


if __name__ == "__main__":
    main()
