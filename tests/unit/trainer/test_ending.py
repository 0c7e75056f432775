"""The trainer's process ends at once, by way of no thread and with all that it has said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import ROOT, environment

STUCK = (
    "import runpy, sys, threading\n"
    "print('said', end='')\n"
    "threading.Thread(target=threading.Event().wait).start()\n"
    "module, config = sys.argv[1:]\n"
    "sys.argv = [module, '--check', '--config', config]\n"
    "runpy.run_module(module, run_name='__main__')\n"
)

both = pytest.mark.parametrize("module", ["ppod_trainer", "ppod_trainer.job"])


def end_of(module: str, config: Path, values: str) -> tuple[int, str, str]:
    config.write_text(values)
    command = [sys.executable, "-c", STUCK, module, str(config)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


@both
def test_no_thread_is_waited_for(module: str, tmp_path: Path) -> None:
    assert end_of(module, tmp_path / "trainer.yaml", f"{{steps: 3, run_dir: {tmp_path}/run}}") == (0, "said", "")


@both
def test_errors_keep_their_code_and_message(module: str, tmp_path: Path) -> None:
    code, said, complaint = end_of(module, tmp_path / "trainer.yaml", "steps: none")
    assert (code, said) == (2, "said")
    assert "steps" in complaint
