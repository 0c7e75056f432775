"""A device without room for the run: one line that says what to do, and no traceback."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ppod_trainer import __main__ as command
from ppod_trainer import ranks
from ppod_trainer.config import TrainerConfig
from ppod_trainer.ranks import Ranks

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB."


@pytest.mark.parametrize(("size", "place"), [(1, ""), (2, "rank 1 of 2: ")])
def test_a_device_without_room_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, size: int, place: str
) -> None:
    @contextmanager
    def opened(*_: object, **__: object) -> Generator[Ranks]:
        yield Ranks(torch.device("cpu"), size - 1, size)

    def train(*_: object) -> int:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(ranks, "open_ranks", opened)
    monkeypatch.setattr(command, "_lead", train)
    monkeypatch.setattr(command, "_follow", train)
    assert command.run(TrainerConfig(run_dir=tmp_path / "run")) == 1
    assert capsys.readouterr().err == (
        f"ppod train: {place}{MESSAGE} [less is needed with a smaller ppo.micro_batch_tokens, "
        "memory.gradient_checkpointing, memory.offload, more ranks, or nobody else on the device]\n"
    )
