"""The launcher and its trainer, told to stop: once, twice, by whom, and with nobody left to read what they say."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from deploy.conftest import (
    StartPpod,
    children_of_run,
    metrics_lines,
    newest_checkpoint,
    wait_for_steps,
)
from support.processes import ROOT, environment


def test_a_second_ctrl_c_does_not_wait_for_the_trainer(start_ppod: StartPpod, run_file: Path, run_dir: Path) -> None:
    ppod = start_ppod("run", "--config", str(run_file))
    wait_for_steps(ppod, run_dir)
    trainer = children_of_run(run_dir)["trainer"]
    # A trainer that is stuck: it neither ends nor answers signals.
    os.kill(trainer, signal.SIGSTOP)
    ppod.signal(signal.SIGINT)
    time.sleep(0.5)
    assert ppod.process.poll() is None
    ppod.signal(signal.SIGINT)
    assert ppod.wait(5) == 130
    assert "killed: trainer" in ppod.stderr
    assert not children_of_run(run_dir)


def test_the_echo_of_a_signal_ends_no_run_without_its_checkpoint(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    """What ends all processes of a job signals launcher and trainer, and the launcher then asks its trainer to end."""
    ppod = start_ppod("run", "--config", str(run_file))
    wait_for_steps(ppod, run_dir)
    for process in (children_of_run(run_dir)["trainer"], ppod.process.pid):
        os.kill(process, signal.SIGTERM)
    time.sleep(0.01)
    ppod.signal(signal.SIGTERM)
    assert ppod.wait() == 143
    assert newest_checkpoint(run_dir) is not None
    assert "killed" not in ppod.stderr


def test_a_hangup_stops_a_run_but_not_under_nohup(
    start_ppod: StartPpod, run_file: Path, run_dir: Path, tmp_path: Path
) -> None:
    ppod = start_ppod("run", "--config", str(run_file), under=["nohup"])
    wait_for_steps(ppod, run_dir)
    ppod.signal(signal.SIGHUP)
    wait_for_steps(ppod, run_dir, metrics_lines(run_dir) + 5)
    ppod.signal(signal.SIGTERM)
    assert ppod.wait() == 143

    # Whoever runs the tests may have been started by nohup.
    directory = tmp_path / "other"
    heard = ["env", "--default-signal=HUP"]
    other = start_ppod("run", "--config", str(run_file), "--trainer.run-dir", str(directory), under=heard)
    wait_for_steps(other, directory)
    other.signal(signal.SIGHUP)
    assert other.wait() == 129
    assert newest_checkpoint(directory) is not None


def test_a_terminal_that_is_closed_after_ctrl_c_leaves_the_time_for_a_checkpoint(run_file: Path, run_dir: Path) -> None:
    """Nor does it change the exit code that nothing can be written to it any more."""
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "ppod_deploy", "run", "--config", str(run_file)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), start_new_session=True, stdin=side, stdout=side, stderr=side
    ) as process:
        os.close(side)
        until = time.monotonic() + 90
        while metrics_lines(run_dir) < 2 and time.monotonic() < until:
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 4096)
        trainer = children_of_run(run_dir)["trainer"]
        # It cannot end before both signals came.
        os.kill(trainer, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        shown = b""
        while b"SIGINT: stopping" not in shown:
            shown += os.read(terminal, 4096)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        os.kill(trainer, signal.SIGCONT)
        assert process.wait(60) == 130
    assert newest_checkpoint(run_dir) in set((run_dir / "checkpoints").glob("step_*"))
    assert not children_of_run(run_dir)


def test_a_run_whose_output_is_read_no_more_ends_in_one_line(run_file: Path, run_dir: Path, tmp_path: Path) -> None:
    """As in `ppod run | head -2`."""
    command = [sys.executable, "-m", "ppod_deploy", "run", "--config", str(run_file)]
    words = tmp_path / "stderr"
    with (
        words.open("wb") as stderr,
        subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        assert process.stdout is not None
        assert [process.stdout.readline().split()[0] for _ in range(2)] == [b"held-out", b"step"]
        process.stdout.close()
        assert process.wait(60) == 1
    said = [line for line in words.read_text().splitlines() if " ready after " not in line]
    checkpoint = newest_checkpoint(run_dir)
    assert said[1:] == [
        f"OutputError: failed after step {int(str(checkpoint)[-6:])}; resume from {checkpoint}",
        "ppod train: nobody reads stdout any more, as behind `| head`; let a file take it",
        "ppod: the trainer ended: exit code 1",
    ]
