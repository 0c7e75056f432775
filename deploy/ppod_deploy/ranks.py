"""What torchrun would tell the ranks of a trainer.

The launcher starts them itself: under torchrun a signal would leave them 30 seconds for a checkpoint, the exit code
would not be the trainer's, and they would outlive a launcher that is killed.
"""

from __future__ import annotations

import os
import socket


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The environment variables of each of so many ranks on this machine; none where there is one."""
    if ranks == 1:
        return [{}]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(_free_port())
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take all cores.
        common["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // ranks, 1))
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
