"""The engines that the benchmark knows: how each is served, and how it is driven in process.

To add one, add an entry to `BACKENDS`: its part of the service's configuration, and a module that answers as
`transformers_engine` does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TypedDict

from support.processes import environment


@dataclass(frozen=True)
class Backend:
    """An engine.

    Attributes:
        engine: module that drives it in process; its argument is the service's configuration.
        python: interpreter that has it; empty: this one.
        values: its part of the service's configuration, besides model and batching.
        joins: whether it can be driven without joins too.
    """

    engine: str
    python: str = ""
    values: dict[str, object] = field(default_factory=dict[str, object])
    joins: bool = True


VLLM_VALUES: dict[str, object] = {"max_model_len": 512}
"""Long enough for all workloads."""
BACKENDS = {
    "transformers": Backend("benchmarks.generation.transformers_engine"),
    # Run the whole benchmark in an environment that has vLLM, such as that of `make setup-vllm`.
    "vllm": Backend("benchmarks.generation.vllm_engine", values={"backend": "vllm"}, joins=False),
}


class EngineReply(TypedDict):
    """What a run in process came to."""

    seconds: float
    steps: int
    tokens: list[list[int]]


class Engine:
    """An engine in a process of its own, which sleeps between runs."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._stdin = stdin
        self._stdout = stdout

    def run(self, workload: str, *, joins: bool = True) -> EngineReply:
        """Generate a workload."""
        self._stdin.write(json.dumps({"workload": workload, "joins": joins}) + "\n")
        self._stdin.flush()
        return json.loads(self._stdout.readline())


@contextmanager
def running_engine(backend: Backend, values: Mapping[str, object]) -> Iterator[Engine]:
    """Start an engine with a service's configuration; it ends with the block."""
    command = [backend.python or sys.executable, "-m", backend.engine, json.dumps(values)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Engine(process.stdin, process.stdout)
        process.stdin.close()
