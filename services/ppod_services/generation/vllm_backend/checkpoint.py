"""The weights that a model's directory holds, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open


class Checkpoint:
    """Safetensors of a model directory, in one file or several.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    @property
    def names(self) -> Sequence[str]:
        """Of all weights."""
        return tuple(self._files)

    def read(self, name: str) -> torch.Tensor | None:
        """One weight as it was saved; None where the checkpoint calls it otherwise."""
        file = self._files.get(name)
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
