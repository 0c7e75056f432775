"""What `ppod run` uses when nothing is said: the run file and the run directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

CONFIGS = Path(__file__).parent / "configs"
CPU_CONFIG = CONFIGS / "smollm2-cpu.yaml"
FLOAT32_CPU_CONFIG = CONFIGS / "smollm2-cpu-float32.yaml"
CUDA_CONFIG = CONFIGS / "smollm2-cuda.yaml"


def default_config() -> Path:
    """The packaged run file for this machine: for a CUDA device that torch can use, or for the kind of CPU."""
    if cuda_usable():
        return CUDA_CONFIG
    return CPU_CONFIG if cpu_is_fast() else FLOAT32_CPU_CONFIG


def cpu_is_fast(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU is of a kind that does the larger run in the same time: with AMX, or with AVX-512 and bfloat16.

    One with AVX2 alone is several times slower. Which data type it computes in `ppod_models.loading.pick_dtype` says.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not {"amx_tile", "avx512_bf16"}.isdisjoint(flags)


def cuda_usable() -> bool:
    """Whether torch would find a CUDA device.

    Asked in another process, and only where the driver shows a device: the launcher itself never imports torch.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
        return False
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return False
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", question], check=False, capture_output=True).returncode == 0


def with_run_dir(values: object, stem: str) -> object:
    """The values with `trainer.run_dir` set, where it is not, to a directory that no other run has.

    Args:
        values: of a run file.
        stem: begins the directory's name.
    """
    if not isinstance(values, Mapping):
        return values
    sections = cast("Mapping[str, object]", values)
    trainer = sections.get("trainer") or {}
    if not isinstance(trainer, Mapping) or "run_dir" in trainer:
        return values
    run_dir = Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return {**sections, "trainer": {**cast("Mapping[str, object]", trainer), "run_dir": str(run_dir)}}
