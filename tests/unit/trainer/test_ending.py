"""The trainer's process ends at once, by way of no thread and with all that it has said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.processes import ROOT, environment

STUCK = (
    "import runpy, sys, threading\n"
    "print('said', end='')\n"
    "threading.Thread(target=threading.Event().wait).start()\n"
    "sys.argv = ['ppod_trainer', '--check', '--config', sys.argv[1]]\n"
    "runpy.run_module('ppod_trainer', run_name='__main__')\n"
)


def end_of(config: Path, values: str) -> tuple[int, str, str]:
    config.write_text(values)
    command = [sys.executable, "-c", STUCK, str(config)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


def test_no_thread_is_waited_for(tmp_path: Path) -> None:
    assert end_of(tmp_path / "trainer.yaml", "steps: 3") == (0, "said", "")


def test_errors_keep_their_code_and_message(tmp_path: Path) -> None:
    code, said, complaint = end_of(tmp_path / "trainer.yaml", "steps: none")
    assert (code, said) == (2, "said")
    assert "steps" in complaint
