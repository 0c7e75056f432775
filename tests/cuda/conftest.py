"""These tests need one CUDA device, and are skipped without: `make test-cuda`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip those of this directory where there is no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device here: `make test-cuda` runs this where there is one")
            )
