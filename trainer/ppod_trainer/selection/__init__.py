"""Which prompts a step samples, and which of its samples it trains on."""

from __future__ import annotations

from ppod_trainer.selection.dynamic import DynamicSampling
from ppod_trainer.selection.history import HistorySchedule
from ppod_trainer.selection.rounds import AllRollouts, Selected, Selection
from ppod_trainer.selection.schedule import EpochSchedule, PromptSchedule

__all__ = [
    "AllRollouts",
    "DynamicSampling",
    "EpochSchedule",
    "HistorySchedule",
    "PromptSchedule",
    "Selected",
    "Selection",
]
