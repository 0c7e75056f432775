"""What a Job's log holds of a run that did not end as it should."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

import pytest

from ppod_trainer import job


def test_a_run_that_a_fault_ends_leaves_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An environment's error is none of the trainer's own, which have an exit code."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    config = tmp_path / "trainer.yaml"
    config.write_text(f"run_dir: {tmp_path}\n")

    def broken(arguments: list[str]) -> int:
        raise ZeroDivisionError(str(arguments))

    monkeypatch.setattr(job, "main", broken)
    with pytest.raises(ZeroDivisionError):
        job.run_job(["--config", str(config)])
    mark, name, part = capsys.readouterr().out.split()
    assert (mark, name) == (job.RESULT_MARK, "metrics.jsonl")
    assert gzip.decompress(base64.b64decode(part)) == b'{"step": 1}\n'


def test_a_command_line_without_configuration_is_complained_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.run_job([])
    assert capsys.readouterr().err.count("the following arguments are required: --config") == 1
