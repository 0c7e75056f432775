"""What the parts of the benchmark share: the model that is pushed, rounds, tables and bars."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.subject import Subject
from ppod import WeightClient
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.broadcasts import ANOTHER_HOST
from support.processes import ServiceProcess, running_service


@dataclass(frozen=True)
class Place:
    """What the parts are told.

    Attributes:
        subject: the model that is pushed.
        rounds: of each figure.
        shared: a directory in memory, which services may read.
        out: directory of the figures.
        service: more of the services' configuration.
    """

    subject: Subject
    rounds: int
    shared: Path
    out: Path
    service: Mapping[str, object]


@dataclass(frozen=True)
class Bar:
    """One figure, and what it must not exceed."""

    name: str
    value: float
    bound: float

    @property
    def met(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        return f"{'ok  ' if self.met else 'MISS'} {self.name:<72} {self.value:8.3f}  (bar <= {self.bound:g})"


@dataclass(frozen=True)
class Timing:
    """Seconds of the rounds of one thing."""

    name: str
    size_bytes: int
    seconds: Sequence[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        speed = self.size_bytes / self.median_s / 1e9
        low, high = min(self.seconds), max(self.seconds)
        return (
            f"{self.name:<52} {self.median_s * 1e3:9.1f} ms  ({low * 1e3:.1f} to {high * 1e3:.1f})  {speed:6.2f} GB/s"
        )


def say(line: object) -> None:
    """Print at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def generation(
    model: Mapping[str, object],
    place: Place,
    *,
    map_files: bool = False,
    relay: bool = False,
    relay_directory: Path | None = None,
) -> Iterator[ServiceProcess]:
    """A generation service; it reads the shared files."""
    vllm = place.service.get("backend") == "vllm"
    values = {
        # vLLM has one kind of device, by how it was built.
        "model": {**model, "device": "auto"} if vllm else dict(model),
        "warm_up_tokens": 16,
        **place.service,
        "weights": {
            "shared_directories": [str(place.shared)],
            "map_shared_files": map_files,
            "collective_addresses": ["127.0.0.1:*"],
            "relay_targets": ["127.0.0.1:*"] if relay else [],
            "relay_directory": None if relay_directory is None else str(relay_directory),
        },
    }
    with (
        tempfile.TemporaryDirectory() as directory,
        running_service(
            "ppod_services.generation",
            Path(directory),
            values,
            fresh=vllm,
            start_timeout_s=600,
            variables=ANOTHER_HOST,
        ) as service,
    ):
        yield service


@contextmanager
def syncing(targets: Sequence[str], config: WeightTransferConfig) -> Iterator[WeightSync]:
    """The trainer's side of the services with these administration ports."""
    sync = WeightSync(FixedReplicas([WeightClient(target, timeout_s=60) for target in targets], "stop"), config)
    try:
        yield sync
    finally:
        sync.close()


def report(
    name: str, place: Place, timings: Sequence[Timing], bars: Sequence[Bar], figures: Mapping[str, object]
) -> bool:
    """Print all, and write it as JSON; whether all bars are met."""
    place.out.mkdir(parents=True, exist_ok=True)
    machine = {"processor": _processor(), "cores": os.cpu_count(), "device": place.subject.machine()}
    content = {
        "timings": [{**asdict(timing), "median_s": timing.median_s} for timing in timings],
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        "figures": dict(figures),
        "machine": machine,
    }
    (place.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    for line in (*timings, *(f"{key}: {value}" for key, value in figures.items()), *bars):
        say(f"  {line}")
    return all(bar.met for bar in bars)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
