"""The trainer as a Job: its results are in its log."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

from ppod_trainer.job import RESULT_MARK
from support.processes import start_module, write_config

from .conftest import System


def test_the_log_of_a_job_holds_its_results(system: System) -> None:
    config = system.config("job")
    path = write_config(system.directory / "job.yaml", config)
    # What is laid over it need not hold where the results are.
    over = write_config(system.directory / "over.yaml", {"steps": 1})
    arguments = ("--config", str(path), "--config", str(over))
    process = start_module("ppod_trainer.job", *arguments, directory=system.directory, name="job")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    parts: dict[str, str] = {}
    for line in stdout.splitlines():
        if line.startswith(RESULT_MARK):
            _, name, part = line.split(" ")
            parts[name] = parts.get(name, "") + part
    run_dir = Path(str(config["run_dir"]))
    expected = {"report.txt", "metrics.jsonl", "evaluation_before.json", "evaluation_after.json", "config.yaml"}
    assert set(parts) == expected
    for name, encoded in parts.items():
        assert gzip.decompress(base64.b64decode(encoded)) == (run_dir / name).read_bytes()


def test_a_job_that_cannot_begin_has_no_results(system: System) -> None:
    path = write_config(system.directory / "wrong.yaml", {"stepz": 1})
    process = start_module("ppod_trainer.job", "--config", str(path), directory=system.directory, name="wrong")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (2, "")
    assert "stepz: unknown key" in stderr
