"""Ranks as processes, with the environment that torchrun gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from support.forked import ForkedProcess
from support.processes import ROOT, environment, free_ports


def start_ranks(
    module: str,
    *arguments: str,
    ranks: int,
    directory: Path,
    name: str,
    environments: Sequence[Mapping[str, str]] = (),
) -> list[ForkedProcess]:
    """Start `python -m module arguments` once for each rank; `directory` takes what they write.

    `environments` has more variables for each rank.
    """
    more = environments or [{}] * ranks
    (port,) = free_ports(1)
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        ForkedProcess(
            module,
            arguments,
            environment={**environment(), **group, "RANK": str(rank), "LOCAL_RANK": str(rank), **more[rank]},
            cwd=ROOT,
            stdout_file=directory / f"{name}-{rank}.stdout",
            stderr_file=directory / f"{name}-{rank}.stderr",
        )
        for rank in range(ranks)
    ]


def wait_for_ranks(processes: Sequence[ForkedProcess], timeout_s: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank; none is left behind."""
    try:
        return [(process.wait(timeout_s), *process.communicate(timeout_s)) for process in processes]
    finally:
        for process in processes:
            process.kill()
