"""Measures ppod's reward service, its peers and the bare forward pass, in turns, on this machine.

usage: python compare.py --peers VENV --vllm VENV [--rounds N] [--seconds S] [--texts N] [--threads N] [--only NAME ...]
    [--out DIRECTORY]

All serve one checkpoint in one dtype with the same threads, texts and bounds of a batch. Each round measures everybody
once, so that a machine that grows slower or faster meets all. Medians over the rounds are shown. Writes result.json,
result.md and result.png; exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

import matplotlib as mpl
import numpy as np
import torch
from checkpoint import make_checkpoint
from contestants import HERE, Contestant, Setting, contestants, running

from ppod_deploy.processes import CHILD_ENVIRONMENT
from ppod_models.loading import pick_dtype
from ppod_models.sources import default_cache_dir

mpl.use("Agg")
import matplotlib.pyplot as plt

REVIEWS = HERE.parents[2] / "trainer/ppod_trainer/data/movie_review_ratings.tsv"
BARE = "bare forward pass, ideal batches"
THROUGHPUT_BAR = 0.95
LATENCY_BAR_S = 1e-3
SCORE_TOLERANCE = 0.1
"""bfloat16 noise of one model behind other batch shapes and attention kernels; scores spread over several units."""


class Reply(TypedDict):
    """What bare.py and the load generators print."""

    sequences_per_s: float
    scores: list[float]
    lone_p50_s: NotRequired[float]
    lone_forward_p50_s: NotRequired[float]
    lone_extra_p50_s: NotRequired[float]
    lone_outside_p50_s: NotRequired[float]


@dataclass(slots=True)
class Measured:
    """One contestant over all rounds."""

    name: str
    sequences_per_s: list[float] = field(default_factory=list)
    lone_p50_s: list[float] = field(default_factory=list)
    lone_forward_p50_s: list[float] = field(default_factory=list)
    lone_extra_p50_s: list[float] = field(default_factory=list)
    lone_outside_p50_s: list[float] = field(default_factory=list)
    largest_score_difference: float = 0.0

    def add(self, reply: Reply, scores: list[float]) -> None:
        """Take one round."""
        self.sequences_per_s.append(reply["sequences_per_s"])
        for name in ("lone_p50_s", "lone_forward_p50_s", "lone_extra_p50_s", "lone_outside_p50_s"):
            if name in reply:
                getattr(self, name).append(reply[name])
        difference = float(np.max(np.abs(np.asarray(reply["scores"]) - np.asarray(scores))))
        self.largest_score_difference = max(self.largest_score_difference, difference)


def write_texts(path: Path, count: int) -> Path:
    """Movie reviews, drawn with a fixed seed."""
    lines = REVIEWS.read_text(encoding="utf-8").splitlines()[1:]
    chosen = np.random.default_rng(0).choice(len(lines), size=count, replace=False)
    path.write_text(json.dumps([lines[index].split("\t")[3] for index in chosen]))
    return path


def measure_round(setting: Setting, chosen: list[Contestant], results: dict[str, Measured], out: Path) -> None:
    """The bare forward pass first, then everybody once."""
    bounds = ("--max-batch-tokens", str(setting.max_batch_tokens), "--max-batch-size", str(setting.max_batch_size))
    command = (
        *(sys.executable, str(HERE / "bare.py"), "--checkpoint", str(setting.checkpoint)),
        *("--texts", str(setting.texts), "--threads", str(setting.threads), "--dtype", setting.dtype, *bounds),
        *("--seconds", str(setting.seconds)),
    )
    bare = run_json(command)
    results[BARE].add(bare, bare["scores"])
    report(results[BARE])
    for contestant in chosen:
        load = (
            *(*contestant.load, "--texts", str(setting.texts), "--in-flight", str(contestant.in_flight)),
            *("--per-request", str(contestant.per_request), "--seconds", str(setting.seconds)),
            *("--lone-calls", str(setting.lone_calls), "--bare", json.dumps([*command, "--lone"])),
        )
        with running(contestant, setting, out / f"{contestant.name.replace(' ', '-').replace(',', '')}.log"):
            results[contestant.name].add(run_json(load), bare["scores"])
        report(results[contestant.name])


def run_json(command: tuple[str, ...]) -> Reply:
    """Run a command and parse what it prints; its errors go to our stderr."""
    environment = {**os.environ, **CHILD_ENVIRONMENT}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def report(measured: Measured) -> None:
    """One line of progress."""
    lone = f", a lone call {measured.lone_extra_p50_s[-1] * 1e3:+.2f} ms" if measured.lone_extra_p50_s else ""
    print(
        f"{measured.name}: {measured.sequences_per_s[-1]:.1f} sequences/s{lone}, scores within "
        f"{measured.largest_score_difference:.3f}",
        flush=True,
    )


def judge(results: dict[str, Measured], chosen: list[Contestant]) -> list[str]:
    """The bars that were missed."""
    misses: list[str] = []
    names = [contestant.name for contestant in chosen]
    ours = [name for name in names if name.startswith("ppod")]
    best = max((statistics.median(ratios(results, name)) for name in ours), default=0.0)
    if ours and best < THROUGHPUT_BAR:
        misses.append(f"throughput over the bare forward pass is {best:.3f}, below {THROUGHPUT_BAR}")
    for name in ours:
        extra = statistics.median(results[name].lone_extra_p50_s)
        if extra > LATENCY_BAR_S:
            misses.append(f"{name}: a lone call takes {extra * 1e3:.2f} ms more than its forward pass")
    for name in names:
        if results[name].largest_score_difference > SCORE_TOLERANCE:
            misses.append(f"{name}: scores differ by {results[name].largest_score_difference:.3f}")
        if name not in ours and statistics.median(ratios(results, name)) >= best:
            misses.append(f"{name} is as fast as ppod")
    return misses


def ratios(results: dict[str, Measured], name: str) -> list[float]:
    """Throughput over that of the bare forward pass of the same round."""
    pairs = zip(results[name].sequences_per_s, results[BARE].sequences_per_s, strict=True)
    return [mine / bare for mine, bare in pairs]


def table(results: dict[str, Measured], setting: Setting) -> str:
    """Markdown."""
    rows = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {setting.threads} thread(s) a forward, "
        f"{setting.dtype}, batches of at most {setting.max_batch_size} sequences and {setting.max_batch_tokens} "
        "tokens",
        "",
        "| | sequences/s | over the bare forward | lone call p50, ms | bare forward, ms | beyond that, p50, ms "
        "| beyond the forward in the server, p50, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for measured in results.values():
        if measured.sequences_per_s:
            lone = (
                *(measured.lone_p50_s, measured.lone_forward_p50_s),
                *(measured.lone_extra_p50_s, measured.lone_outside_p50_s),
            )
            shown = [f"{statistics.median(values) * 1e3:.2f}" if values else "" for values in lone]
            rows.append(
                f"| {measured.name} | {statistics.median(measured.sequences_per_s):.1f} "
                f"| {statistics.median(ratios(results, measured.name)):.3f} | {' | '.join(shown)} |"
            )
    return "\n".join(rows) + "\n"


def plot(results: dict[str, Measured], path: Path) -> None:
    """Throughput of each, with the spread over the rounds."""
    shown = [measured for measured in results.values() if measured.sequences_per_s]
    medians = [statistics.median(measured.sequences_per_s) for measured in shown]
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(shown) + 1.2), layout="constrained")
    axes.barh([measured.name for measured in shown], medians, color=["#888888", *["#3366aa"] * (len(shown) - 1)])
    for row, measured in enumerate(shown):
        axes.plot(measured.sequences_per_s, [row] * len(measured.sequences_per_s), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel("sequences a second (bar: median, dots: rounds)")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, metavar="VENV", help="environment of FastAPI and LitServe")
    parser.add_argument("--vllm", type=Path, required=True, metavar="VENV", help="environment of vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of saturation, each (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--lone-calls", type=int, default=100)
    parser.add_argument("--port", type=int, default=18950)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="contestants whose names begin so")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-serving"))
    return parser.parse_args()


def main() -> int:
    """Measure, write, judge."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        setting = Setting(
            checkpoint=make_checkpoint(default_cache_dir() / "benchmarks/smollm2-sequence-classification"),
            texts=write_texts(directory / "texts.json", options.texts),
            port=options.port,
            threads=options.threads,
            dtype=str(pick_dtype(options.dtype, torch.device("cpu"))).removeprefix("torch."),
            max_batch_tokens=options.max_batch_tokens,
            max_batch_size=options.max_batch_size,
            seconds=options.seconds,
            lone_calls=options.lone_calls,
        )
        everybody = contestants(setting, options.peers, options.vllm, directory)
        chosen = [each for each in everybody if not options.only or each.name.startswith(tuple(options.only))]
        results = {name: Measured(name) for name in (BARE, *(each.name for each in chosen))}
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", flush=True)
            measure_round(setting, chosen, results, options.out)
    misses = judge(results, chosen)
    shown = table(results, setting)
    (options.out / "result.md").write_text(shown)
    record = {"results": [asdict(measured) for measured in results.values()], "misses": misses}
    (options.out / "result.json").write_text(json.dumps(record, indent=2))
    plot(results, options.out / "result.png")
    print(shown)
    for miss in misses:
        print(f"missed: {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
