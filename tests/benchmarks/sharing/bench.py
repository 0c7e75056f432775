"""What the two benchmarks share: the server under load, the generator's process, figures and plots."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.sharing.load import Call, Load, Stream
from support.processes import ServiceProcess, environment, metrics_of, running_service

MODEL = {"source": "packaged:smollm2-135m-instruct", "threads": 1, "dtype": "float32"}
LOAD_SCRIPT = Path(__file__).with_name("load.py")
GRACE_S = 120.0


@dataclass(frozen=True)
class Bar:
    """One figure, and what it must reach."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'ok  ' if self.met else 'MISS'} {self.name:<58} {self.value:10.3f}  (bar {sign} {self.bound:g})"


@dataclass(frozen=True)
class Server:
    """A reward service on SmolLM2 with one thread, and the token of each team."""

    process: ServiceProcess
    tokens: Mapping[str, str]

    def stream(self, team: str, **values: object) -> Stream:
        return Stream(team=team, token=self.tokens[team], **values)  # pyright: ignore[reportArgumentType]

    def served_tokens(self) -> dict[str, float]:
        """Tokens that the model has processed, by team."""
        prefix = 'ppod_team_served_tokens_total{team="'
        lines = [line for line in metrics_of(self.process).splitlines() if line.startswith(prefix)]
        return {line[len(prefix) :].split('"')[0]: float(line.split()[-1]) for line in lines}

    def rss_mib(self) -> float:
        """Resident memory of the server."""
        statm = Path(f"/proc/{self.process.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def serving(teams: Sequence[str], batching: Mapping[str, object]) -> Iterator[Server]:
    """Start the service with teams of equal weight."""
    tokens = {team: secrets.token_urlsafe(16) for team in teams}
    entries = [{"name": team, "token_sha256": [hashlib.sha256(tokens[team].encode()).hexdigest()]} for team in teams]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        teams_file = directory / "teams.yaml"
        teams_file.write_text(yaml.safe_dump({"teams": entries}))
        values: dict[str, object] = {
            "rewards": [{"name": "reward", "model": MODEL, "head": "reviews-reward"}],
            "batching": dict(batching),
            "tenancy": {"teams_file": str(teams_file)},
        }
        with running_service("ppod_services.reward", directory, values, admin=False, fresh=True) as process:
            yield Server(process, tokens)


class Generating:
    """A load under way in a process of its own."""

    def __init__(self, load: Load) -> None:
        self._file = Path(tempfile.mkdtemp()) / "calls.jsonl"
        self._seconds = load.seconds
        self._process = subprocess.Popen(
            [sys.executable, str(LOAD_SCRIPT), str(self._file)], stdin=subprocess.PIPE, env=environment()
        )
        assert self._process.stdin is not None
        self._process.stdin.write(load.to_json().encode())
        self._process.stdin.close()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def calls(self) -> list[Call]:
        """Wait for the end, and read what happened."""
        code = self._process.wait(self._seconds + GRACE_S)
        if code:
            raise SystemExit(f"the load generator failed with exit code {code}")
        calls = [Call(**json.loads(line)) for line in self._file.read_text().splitlines()]
        self._file.unlink()
        self._file.parent.rmdir()
        return sorted(calls, key=lambda call: call.due_s)


def generate(server: Server, seconds: float, *streams: Stream) -> list[Call]:
    """Run a load to its end."""
    return Generating(Load(server.process.target, seconds, streams)).calls()


def quantile(values: Sequence[float], part: float) -> float:
    """A quantile of measured values: the smallest one that at least this part does not exceed."""
    return float(np.quantile(values, part, method="inverted_cdf")) if len(values) else float("nan")


def report(name: str, out: Path, figures: Mapping[str, object], bars: Sequence[Bar]) -> int:
    """Print the bars, write the figures as JSON, and return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    met = {bar.name: {"value": bar.value, "bound": bar.bound, "met": bar.met} for bar in bars}
    (out / f"{name}.json").write_text(json.dumps({**figures, "bars": met, "machine": machine}, indent=2) + "\n")
    for bar in bars:
        sys.stdout.write(f"{bar}\n")
    sys.stdout.write(f"figures and plot: {out / name}.json, .png\n")
    return 0 if all(bar.met for bar in bars) else 1
