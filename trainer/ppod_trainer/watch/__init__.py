"""Watching a run for trouble, such as reward hacking or collapse: one detector for each kind."""

from __future__ import annotations

from ppod_trainer.watch.base import Detector
from ppod_trainer.watch.watcher import Watcher, build_watcher

__all__ = ["Detector", "Watcher", "build_watcher"]
