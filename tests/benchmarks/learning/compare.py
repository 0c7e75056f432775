"""What each algorithm makes of a random policy, over several seeds: a table and a picture.

Run as `python -m benchmarks.learning.compare` with tests/ on the path. The task is `support.copying`: a random
one-layer transformer is to say the letters of a word again; each letter in its place pays a third. Every run has the
same samples a step and the same optimizer, tuned for none of them; a seed decides the model, the prompts and all draws.
Each run goes through real services. Held-out words, never trained on, are asked for before and after.

`spelling` is the same with one letter a turn, paid at the end, for the algorithms that tell turns apart.

Writes result.json, result.md and result.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from support.copying_runs import GROUPS, IN_LOSS, Config, CopyingSystem, copying_system, whole_words

Changes = dict[str, Config]

SPELLING: Changes = {"environment": {"name": "test_spelling", "max_turns": 3}, "rollout": {"max_tokens": 2}}
RECIPES: dict[str, Changes] = {
    "ppo": {},
    "grpo": {"advantages": {"kind": "grpo"}, "rollout": GROUPS, "kl": IN_LOSS},
    "dr_grpo": {"advantages": {"kind": "dr_grpo"}, "rollout": GROUPS, "kl": IN_LOSS},
    "rloo": {"advantages": {"kind": "rloo"}, "rollout": GROUPS, "kl": {"coefficient": 0.001}},
    "reinforce_pp": {"advantages": {"kind": "reinforce_pp"}, "kl": {"coefficient": 0.001}},
    "reinforce_pp_baseline": {
        "advantages": {"kind": "reinforce_pp_baseline"},
        "rollout": GROUPS,
        "kl": {**IN_LOSS, "estimator": "k2"},
    },
    "pvpo": {"advantages": {"kind": "pvpo"}, "kl": IN_LOSS},
    "dapo": {"advantages": {"kind": "grpo"}, "rollout": {**GROUPS, "dynamic_sampling": {"max_rounds": 3}}},
    "srpo": {"advantages": {"kind": "grpo"}, "rollout": {**GROUPS, "history_resampling": {}}},
    "ppo, spelling": SPELLING,
    "gigpo, spelling": {
        **SPELLING,
        "advantages": {"kind": "gigpo"},
        "rollout": {**GROUPS, "max_tokens": 2},
        "kl": IN_LOSS,
    },
    "spa, spelling": {**SPELLING, "advantages": {"kind": "spa"}},
}


@dataclass(frozen=True)
class Run:
    """What became of one run.

    Attributes:
        letters: mean outcome of the samples of each step.
        before, after: share of held-out words that were copied whole.
        seconds: of the whole run, its start and evaluations included.
        step_seconds: median of a step.
        samples: that were drawn for training.
    """

    recipe: str
    seed: int
    letters: list[float]
    before: float
    after: float
    seconds: float
    step_seconds: float
    samples: int


def run(system: CopyingSystem, recipe: str, seed: int, steps: int) -> Run:
    """Train once."""
    name = f"{recipe.replace(', ', '-')}-{seed}"
    config = {**system.config(name, **RECIPES[recipe], steps=steps), "seed": seed}
    begun = time.monotonic()
    system.train(config, timeout_s=1200)
    seconds = time.monotonic() - begun
    run_dir = Path(str(config["run_dir"]))
    words = whole_words(run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "score/mean" in record]
    rounds = sum(record.get("selection/rounds", 1) for record in trained)
    return Run(
        recipe=recipe,
        seed=seed,
        letters=[record["score/mean"] for record in trained],
        before=words[0],
        after=words[steps],
        seconds=seconds,
        step_seconds=statistics.median(record["seconds/step"] for record in trained),
        samples=int(rounds) * 256,
    )


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """One row an algorithm: medians over seeds, and the worst."""
    lines = [
        "| algorithm | words copied whole before | after, median | after, worst seed | steps to 90% of letters | "
        "samples drawn | seconds a step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for recipe, some in runs.items():
        reached = [steps_to(one.letters, 0.9) for one in some]
        shown = ", ".join("never" if steps is None else str(steps) for steps in reached)
        lines.append(
            f"| {recipe} | {statistics.median(one.before for one in some):.0%} | "
            f"{statistics.median(one.after for one in some):.0%} | {min(one.after for one in some):.0%} | {shown} | "
            f"{statistics.median(one.samples for one in some):.0f} | "
            f"{statistics.median(one.step_seconds for one in some):.2f} |"
        )
    return "\n".join(lines) + "\n"


def steps_to(letters: Sequence[float], share: float) -> int | None:
    """First step whose samples had at least this share of letters right."""
    return next((step for step, value in enumerate(letters, start=1) if value >= share), None)


def draw(path: Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """A curve for each algorithm: the median over seeds, and from the lowest to the highest."""
    columns = 4
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns, 2.6 * rows),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (recipe, some) in zip(axes.flat, runs.items(), strict=False):
        letters = np.array([one.letters for one in some])
        steps = np.arange(1, letters.shape[1] + 1)
        axis.fill_between(steps, letters.min(axis=0), letters.max(axis=0), alpha=0.25)
        axis.plot(steps, np.median(letters, axis=0))
        axis.axhline(0.9, color="black", lw=0.6, ls=":")
        after = statistics.median(one.after for one in some)
        axis.set(title=f"{recipe}: {after:.0%} of words", ylim=(0, 1.03), xlim=(1, letters.shape[1]))
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for row in axes:
        row[0].set_ylabel("letters right")
    seeds = max(len(some) for some in runs.values())
    figure.suptitle(f"copying three letters from a random start: median and range of {seeds} seed{'s' * (seeds > 1)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="algorithms to run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-learning"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {recipe: [] for recipe in options.only}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory, copying_system(Path(directory), seed=seed) as system:
            for recipe in options.only:
                found = run(system, recipe, seed, options.steps)
                runs[recipe].append(found)
                print(
                    f"{recipe}, seed {seed}: {found.before:.0%} -> {found.after:.0%}, {found.seconds:.0f} s", flush=True
                )
        # After each seed, so that what was measured stays if the next is cut off.
        (options.output / "result.json").write_text(
            json.dumps([asdict(one) for some in runs.values() for one in some], indent=1)
        )
        (options.output / "result.md").write_text(table(runs))
        draw(options.output / "result.png", runs)
    print(table(runs))


if __name__ == "__main__":
    main()
