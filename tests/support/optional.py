"""Skips of tests that need what not every environment has."""

from __future__ import annotations

import importlib.util

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: it comes with ppod[qlora], and with `make setup`",
)
