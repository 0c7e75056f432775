"""The weights that a model's directory holds, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from ppod_models.loading import quantisation_of


class Checkpoint:
    """Safetensors of a model directory, in one file or several.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    @property
    def names(self) -> Sequence[str]:
        """Of all weights."""
        return tuple(self._files)

    @functools.cached_property
    def quantisation(self) -> str | None:
        """How the weights are quantised; None: they are not."""
        return quantisation_of(AutoConfig.from_pretrained(self._path))

    def read(self, name: str) -> torch.Tensor | None:
        """One weight as it was saved; None where the checkpoint calls it otherwise."""
        file = self._files.get(name)
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
