"""Memory of each rank while it loads its part of a policy on a CPU, beside the whole model in float32.

usage: PYTHONPATH=protos:services:trainer:deploy:tests python -m benchmarks.scale.loading [--ranks 2 4]

Told are the growth of VmHWM until the policy is loaded, with all imports done before, and what of it is left then that
is in no file. The former counts the pages of the model's files that a rank has mapped, which ranks of one host share.
The model's files are written in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ppod_models.loading import load_causal_lm
from ppod_models.sources import resolve
from support.processes import ROOT, environment, free_ports, write_config


def load_on_ranks(directory: Path, ranks: int, sections: dict[str, object]) -> list[dict[str, int]]:
    """Memory of each rank, in bytes; see `support.ranked_loading`."""
    config = write_config(directory / "config.yaml", {"run_dir": str(directory), **sections})
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "support.ranked_loading", "--config", str(config)]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **environment(), **group, "RANK": str(rank)}, cwd=ROOT)
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{ranks} ranks: one failed")
    return [json.loads((directory / f"loaded-{rank}.json").read_text()) for rank in range(ranks)]


def save_as(source: str, dtype: torch.dtype, directory: Path) -> Path:
    """Write a model's files in this dtype."""
    path = resolve(source).path
    load_causal_lm(path, device=torch.device("cpu"), dtype=dtype).save_pretrained(directory)
    for file in path.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for dtype in (torch.float32, torch.bfloat16):
            model = save_as(options.model, dtype, Path(made) / str(dtype))
            policy = {"source": str(model), "device": "cpu", "dtype": "float32", "threads": 1}
            kinds: dict[str, dict[str, object]] = {
                "all is trained": {"policy": policy},
                "an adapter": {"policy": {**policy, "lora": {}}},
                "with a value model": {"policy": policy, "critic": {"kind": "model"}},
            }
            for ranks in options.ranks:
                for kind, sections in kinds.items():
                    found = load_on_ranks(Path(made), ranks, sections)
                    peak, own, whole = (max(one[key] for one in found) / 2**20 for key in ("peak", "own", "model"))
                    print(
                        f"files in {dtype}, {ranks} ranks, {kind}: at most {peak:.0f} MiB each, {own:.0f} MiB at the "
                        f"end; the whole in float32 is {whole:.0f} MiB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
