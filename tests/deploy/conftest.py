"""The `ppod` command as a process, on a run of the tiny model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from support.processes import ROOT, environment, free_ports
from support.tiny_head import save_tiny_head

Section = dict[str, object]


@dataclass
class PpodProcess:
    """A started `ppod` command."""

    process: subprocess.Popen[bytes]
    stdout_file: Path
    stderr_file: Path

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; stderr:\n{self.stderr}\nstdout:\n{self.stdout}") from None

    def wait_until(self, done: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
        until = time.monotonic() + timeout_s
        while not done():
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"no {what}; exit code {self.process.poll()}; stderr:\n{self.stderr}")
            time.sleep(0.05)


StartPpod = Callable[..., PpodProcess]


def processes_naming(path: Path) -> dict[int, str]:
    """Command lines, by process id, of the processes whose command line holds this path."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(path) in command:
                found[int(entry.name)] = command
    return found


def children_of_run(run_dir: Path) -> dict[str, int]:
    """Process ids of a run's children, by name. Its launcher is not among them: it is given a run file elsewhere."""
    config = f"{run_dir}/config/"
    return {
        command.split(config)[1].split(".yaml")[0]: pid
        for pid, command in processes_naming(run_dir).items()
        if config in command
    }


def eventually_no_children(run_dir: Path, timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while children_of_run(run_dir):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session")
def tiny_head_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_head(tiny_model_dir, tmp_path_factory.mktemp("head") / "tiny-head")


@pytest.fixture
def run_values(tiny_model_dir: Path, tiny_head_dir: Path, tmp_path: Path) -> dict[str, Section]:
    """A run file's values: the tiny model everywhere, free ports, more steps than any test waits for."""
    model: Section = {"source": str(tiny_model_dir), "device": "cpu", "dtype": "float32", "threads": 1}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a tale of {number} cities\n" for number in range(40)))
    ports = free_ports(5)
    return {
        "services": {
            "reward": {
                "listen": {"port": ports[0]},
                "rewards": [{"name": "tiny", "model": model, "head": str(tiny_head_dir)}],
            },
            "reference": {"listen": {"port": ports[1], "admin_port": ports[2]}, "model": model},
            "generation": {"listen": {"port": ports[3], "admin_port": ports[4]}, "model": model},
        },
        "trainer": {
            "run_dir": str(tmp_path / "run"),
            "steps": 100_000,
            "policy": model,
            "prompts": {"path": str(prompts), "heldout": 4, "first_tokens": 12},
            "rollout": {"batch_size": 4, "max_tokens": 4},
            "metrics": {"port": None, "tensorboard": False},
        },
    }


@pytest.fixture
def start_ppod(tmp_path: Path) -> Iterator[StartPpod]:
    """Start `ppod` with arguments, perhaps under another command; whatever is left of it afterwards is killed."""
    started: list[PpodProcess] = []

    def start(*arguments: str, under: Sequence[str] = ()) -> PpodProcess:
        number = len(started)
        stdout_file, stderr_file = tmp_path / f"ppod-{number}.stdout", tmp_path / f"ppod-{number}.stderr"
        with stdout_file.open("wb") as stdout, stderr_file.open("wb") as stderr:
            process = subprocess.Popen(
                [*under, sys.executable, "-m", "ppod_deploy", *arguments],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        started.append(PpodProcess(process, stdout_file, stderr_file))
        return started[-1]

    yield start
    for ppod in started:
        if ppod.process.poll() is None:
            ppod.process.kill()
        ppod.process.wait(30)


@pytest.fixture
def run_file(run_values: dict[str, Section], tmp_path: Path) -> Path:
    """The run file of `run_values`, in a directory of its own: the children's command lines hold the run directory."""
    path = tmp_path / "file" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(run_values))
    return path


def metrics_lines(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for_steps(ppod: PpodProcess, run_dir: Path, steps: int = 1) -> None:
    ppod.wait_until(lambda: metrics_lines(run_dir) >= steps, f"{steps} steps")


def newest_checkpoint(run_dir: Path) -> Path | None:
    return max((run_dir / "checkpoints").glob("*"), default=None, key=lambda path: path.stat().st_mtime)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
