"""What ppod and TRL's PPOTrainer learn on the same task, over seeds: score and KL at the same number of episodes.

usage: python curves.py --trl-python PYTHON [--setting NAME] [--sides NAME ...] [--seeds N] [--steps N]
    [--kl-coefficient C] [--at KL ...] [--out DIR]

Both get the same weights, reward model, batch, epochs, minibatches, learning rate and KL coefficient, chosen for
neither; all else is each program's own default. Further sides have a stronger penalty, TRL's as well as ppod's, and
what TRL has not: the penalty in the loss, or the score paid as it arises. ppod runs as `ppod run` starts it. Settings
small-model and small-steps train a small language model of movie reviews (small_model.py), the others SmolLM2. Score
and KL of a step are those of its samples, which the policy drew before it was updated with them; KL is k1 to the
reference, in nats a response, on both sides.

Scores are compared at equal KL: a run's curve of score over KL is read at a KL that all sides reach, the lowest of
their medians at the end, or at those that are given. Writes result.json, result.md and result.png; what is there
already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from compare import REVIEWS, ROOT, run_values, start_ppod
from settings import SETTINGS, Setting, Task
from small_model import make_small_model

from ppod_deploy.processes import CHILD_ENVIRONMENT
from ppod_models.sources import default_cache_dir, resolve

SHAPED: dict[str, object] = {"rewards": {"shaping": "token"}, "kl": {"coefficient": 0.12}}
"""The score paid as it arises, with a penalty that ends near the KL of TRL with 0.08."""

SIDES: dict[str, dict[str, object]] = {
    "ppod": {},
    # As TRL has one.
    "ppod, a value model of its own": {"critic": {"kind": "model"}},
    "TRL": {},
    # What TRL's PPOTrainer has not: the penalty as a term of the loss, by the estimator whose gradient is KL's.
    "ppod, KL in the loss": {
        "critic": {"kind": "model"},
        "kl": {"placement": "loss", "estimator": "k2", "coefficient": 0.15},
    },
    "TRL, KL coefficient 0.08": {"kl": {"coefficient": 0.08}},
    "ppod, shaped": {"critic": {"kind": "model"}, **SHAPED},
    "ppod, shaped, a value head": SHAPED,
    # For SmolLM2, whose reward model reads further tokens behind each prefix.
    "ppod, shaped every fourth token": {
        "rewards": {"shaping": "token", "shaping_interval": 4},
        "kl": {"coefficient": 0.08},
    },
    # As the packaged run file has it.
    "ppod, shaped, KL coefficient 0.06": {
        "rewards": {"shaping": "token", "shaping_interval": 4},
        "kl": {"coefficient": 0.06},
    },
}
"""Who learns, and what ppod's trainer is configured with besides; of TRL the KL coefficient alone."""

SMALL_MODEL = ("small-model", "small-steps")
SMOLLM2 = ("default-run", "default-run-float32")
SMOOTHED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: mean score and KL of each step's samples."""

    side: str
    seed: int
    scores: list[float]
    kls: list[float]

    def smoothed(self) -> tuple[np.ndarray, np.ndarray]:
        """Running means of KL and score over a few steps, [steps - SMOOTHED_STEPS + 1] each."""
        kernel = np.ones(SMOOTHED_STEPS) / SMOOTHED_STEPS
        return np.convolve(self.kls, kernel, "valid"), np.convolve(self.scores, kernel, "valid")

    def end(self) -> tuple[float, float]:
        """KL and score over the last steps."""
        kls, scores = self.smoothed()
        return float(kls[-1]), float(scores[-1])

    def score_at(self, kl: float) -> float:
        """Score where the smoothed KL first comes to `kl`; the last one where it never does."""
        kls, scores = self.smoothed()
        reached = np.maximum.accumulate(kls)
        return float(np.interp(kl, reached, scores))


def run_ppod(side: str, setting: Setting, task: Task, steps: int, directory: Path) -> Curve:
    """Train with ppod."""
    run_dir = directory / "ppod"
    directory.mkdir(parents=True, exist_ok=True)
    values = run_values(setting, steps, run_dir, task)
    start_ppod({**values, "trainer": {**values["trainer"], **SIDES[side]}}, directory)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "score/mean" in record]
    scores, kls = ([record[key] for record in trained] for key in ("score/mean", "kl/reference"))
    return Curve(side, setting.seed, scores, kls)


def run_trl(side: str, python: Path, setting: Setting, task: Task, steps: int, directory: Path) -> Curve:
    """Train with TRL."""
    directory.mkdir(parents=True, exist_ok=True)
    result_file = directory / "trl.json"
    command = [str(python), str(Path(__file__).with_name("run_trl.py")), setting.name, "--steps", str(steps)]
    command += ["--model", str(resolve(task.model).path), "--reviews", str(REVIEWS), "--reward", task.head]
    command += ["--services", str(ROOT / "services"), "--seed", str(setting.seed), "--out", str(result_file)]
    kl = cast("dict[str, object]", SIDES[side].get("kl", {}))
    command += ["--kl-coefficient", str(kl.get("coefficient", setting.kl_coefficient))]
    with (directory / "trl.log").open("wb") as log:
        environment = {**os.environ, **(CHILD_ENVIRONMENT if setting.trl.tuned else {})}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    result = json.loads(result_file.read_text())
    return Curve(side, setting.seed, result["scores"], result["kl"])


def kept(path: Path, run: Callable[[], Curve]) -> Curve:
    """The curve of a file, or a run whose curve goes there."""
    if path.is_file():
        return Curve(**json.loads(path.read_text()))
    curve = run()
    path.write_text(json.dumps(asdict(curve)))
    kl, score = curve.end()
    print(f"{curve.side}, seed {curve.seed}: score {curve.scores[0]:.2f} -> {score:.2f}, KL {kl:.2f}", flush=True)
    return curve


def equal_kl(curves: Mapping[str, Sequence[Curve]]) -> float:
    """A KL that all sides come to: the lowest of their medians at the end."""
    return min(statistics.median(curve.end()[0] for curve in some) for some in curves.values())


def table(curves: Mapping[str, Sequence[Curve]], given: Sequence[float]) -> str:
    """One row a side: medians over seeds with the range."""
    kls = list(given) or [equal_kl(curves)]
    names = " | ".join(f"score at a KL of {kl:.2f}" for kl in kls)
    rows = [
        f"| | seeds | score before | score at the end | KL at the end, nats | {names} |",
        f"|---|---:|---:|---:|---:|{'---:|' * len(kls)}",
    ]
    for side, some in curves.items():
        columns = (
            [curve.scores[0] for curve in some],
            [curve.end()[1] for curve in some],
            [curve.end()[0] for curve in some],
            *([curve.score_at(kl) for curve in some] for kl in kls),
        )
        shown = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in columns]
        rows.append(f"| {side} | {len(some)} | {' | '.join(shown)} |")
    for side in [side for side in curves if side != "TRL"]:
        for kl in kls:
            pairs = zip(curves[side], curves["TRL"], strict=True)
            higher = sum(curve.score_at(kl) > other.score_at(kl) for curve, other in pairs)
            rows += [
                "",
                f"{side}: a higher score than TRL at a KL of {kl:.2f} with {higher} of {len(curves[side])} seeds.",
            ]
    return "\n".join([*rows, "", "Medians (ranges)."]) + "\n"


def draw(path: Path, curves: Mapping[str, Sequence[Curve]], setting: Setting) -> None:
    """Score and KL by episodes, and score by KL."""
    figure, (by_score, by_kl, frontier) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for color, (side, some) in zip(mpl.color_sequences["tab10"], curves.items(), strict=False):
        episodes = np.arange(1, len(some[0].scores) + 1) * setting.batch_size
        for axis, values in ((by_score, [c.scores for c in some]), (by_kl, [c.kls for c in some])):
            stacked = np.array(values)
            axis.fill_between(episodes, stacked.min(axis=0), stacked.max(axis=0), color=color, alpha=0.2, lw=0)
            axis.plot(episodes, np.median(stacked, axis=0), color=color, label=side)
        for curve in some:
            frontier.plot(*curve.smoothed(), color=color, lw=1, alpha=0.6)
    by_score.set(xlabel="episodes", ylabel="mean score of the samples")
    by_kl.set(xlabel="episodes", ylabel="KL to the reference, nats a response")
    frontier.set(xlabel="KL, nats a response", ylabel="score", title=f"means of {SMOOTHED_STEPS} steps, a line a seed")
    figure.legend(*by_score.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{setting.name}: median and range of {len(curves['TRL'])} seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, type=Path, help="interpreter of the environment with TRL")
    parser.add_argument("--setting", choices=(*SMALL_MODEL, *SMOLLM2), default="small-model")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=list(SIDES),
        default=list(SIDES)[:-1],
        help="TRL among them (default: all but the last)",
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kl-coefficient", type=float, help="of the penalty in the reward; none: the setting's")
    parser.add_argument("--at", nargs="+", type=float, default=[], help="KLs to compare scores at")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-curves"))
    options = parser.parse_args()
    setting, task = SETTINGS[options.setting], Task()
    if options.kl_coefficient is not None:
        setting = replace(setting, kl_coefficient=options.kl_coefficient)
    if setting.name in SMALL_MODEL:
        model, head = make_small_model(default_cache_dir() / "benchmarks/small-reviews-model", REVIEWS)
        task = Task(str(model), str(head))
    out: Path = options.out / setting.name
    curves: dict[str, list[Curve]] = {side: [] for side in SIDES if side in options.sides}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        seeded, directory = replace(setting, seed=seed), out / f"seed-{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        for side, found in curves.items():
            place = directory / side.replace(",", "").replace(" ", "-")

            def run(side: str = side, setting: Setting = seeded, place: Path = place) -> Curve:
                if side.startswith("TRL"):
                    return run_trl(side, options.trl_python, setting, task, options.steps, place)
                return run_ppod(side, setting, task, options.steps, place)

            # Not with_suffix: a side's name may have a number with a point.
            found.append(kept(place.with_name(f"{place.name}.json"), run))
        # After each seed, so that what was measured stays if the next is cut off.
        record = {"setting": asdict(setting), "curves": [asdict(one) for some in curves.values() for one in some]}
        (out / "result.json").write_text(json.dumps(record, indent=1))
        (out / "result.md").write_text(table(curves, options.at))
        draw(out / "result.png", curves, setting)
    print(table(curves, options.at))


if __name__ == "__main__":
    main()
