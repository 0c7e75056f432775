"""`python -m ppod_trainer.job --config FILE ...`: `python -m ppod_trainer`, which then writes its results to its log.

A pod that has ended can no longer be asked for files; its log stays. `ppod k8s train` reads them there.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import sys
from pathlib import Path

from ppod_models.configuration import ConfigError, load_config
from ppod_trainer.__main__ import end, main
from ppod_trainer.config import TrainerConfig

RESULT_MARK = "ppod-result"
"""A line of a result: this, the file's name, and a part of its gzipped bytes in base64."""

_FILES = ("report.txt", "metrics.jsonl", "evaluation_before.json", "evaluation_after.json", "config.yaml")
_LINE_BYTES = 8_192
"""Container runtimes cut longer lines than 16 KiB into parts."""


def run_job(arguments: list[str]) -> int:
    """Run the trainer, then write what there is of its results; returns the trainer's exit code."""
    try:
        return main(arguments)
    finally:
        # Also where a fault, such as an environment's own, ends it.
        _write_results(arguments)


def _write_results(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", type=Path, action="append")
    known, _ = parser.parse_known_args(arguments)
    try:
        run_dir = load_config(TrainerConfig, *known.config).run_dir if known.config else None
    except ConfigError:
        return
    for name in _FILES:
        if run_dir is not None and (run_dir / name).is_file():
            _write(name, (run_dir / name).read_bytes())


def _write(name: str, content: bytes) -> None:
    encoded = base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")
    for begin in range(0, len(encoded), _LINE_BYTES):
        print(RESULT_MARK, name, encoded[begin : begin + _LINE_BYTES], flush=True)


if __name__ == "__main__":
    end(run_job(sys.argv[1:]))
