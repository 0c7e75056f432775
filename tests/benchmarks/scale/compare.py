"""Seconds of the update and of old logprobs, and memory, by ranks, micro-batches and checkpointing, on this machine.

usage: PYTHONPATH=protos:services:trainer:deploy:tests python -m benchmarks.scale.compare [--updates 4] [--rounds 2]

Processor seconds are those of rank 0's process in one call of the learner: on cores that others use, too, they tell
what the wall clock would without these, but for waiting for other ranks. Each rank has one thread. The samples are
random: prompts of 1 to 5 tokens, responses of 1 to `--longest-response`. Settings take turns, and the medians are over
all updates but each process's first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from support.processes import ROOT, environment, free_ports, write_config

SETTINGS: dict[str, tuple[int, dict[str, object], dict[str, object]]] = {
    "1 rank, minibatches whole": (1, {}, {}),
    "1 rank, 4 samples a micro-batch": (1, {"micro_batch_size": 4}, {}),
    "1 rank, 512 padded tokens a micro-batch": (1, {"micro_batch_tokens": 512}, {}),
    "1 rank, minibatches whole, checkpointing": (1, {}, {"gradient_checkpointing": True}),
    "2 ranks, 512 padded tokens a micro-batch": (2, {"micro_batch_tokens": 512}, {}),
}


def measure(directory: Path, name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Figures of each update of one setting."""
    ranks, ppo, memory = SETTINGS[name]
    values = {
        "run_dir": str(directory),
        "policy": {"source": options.model, "device": "cpu", "dtype": options.dtype, "threads": 1},
        "rollout": {"batch_size": options.samples},
        "ppo": ppo,
        "memory": memory,
    }
    config = write_config(directory / "config.yaml", values)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "support.ranked_learning", "--config", str(config), "--no-save"]
    command += ["--until", str(options.updates), "--longest-response", str(options.longest_response)]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **environment(), **group, "RANK": str(rank)}, cwd=ROOT)
        for rank in range(ranks)
    ]
    for process in processes:
        if process.wait() != 0:
            raise SystemExit(f"{name}: a rank failed")
    return json.loads((directory / "figures.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--only", default="", help="settings whose names hold this")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--longest-response", type=int, default=64)
    options = parser.parse_args()
    found: dict[str, list[dict[str, object]]] = {name: [] for name in SETTINGS if options.only in name}
    for _ in range(options.rounds):
        for name in found:
            with tempfile.TemporaryDirectory() as directory:
                found[name] += measure(Path(directory), name, options)[1:]
    for name, figures in found.items():
        seconds = {
            phase: statistics.median(float(one["seconds"][phase]) for one in figures)  # type: ignore[index]
            for phase in ("old_logprobs", "update", "processor")
        }
        peak = max(int(str(one["peak_bytes"])) for one in figures)
        print(
            f"{name}: old logprobs {seconds['old_logprobs']:.2f} s, update {seconds['update']:.2f} s, "
            f"processor {seconds['processor']:.2f} s, rank 0 at most {peak / 2**20:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
