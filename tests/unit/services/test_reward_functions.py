"""The reward functions that ppod carries, by hand."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tomllib
from pathlib import Path

import pytest

from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.reward.functions import FunctionSample
from ppod_services.reward.functions.pool import FunctionPool, NumberedSample
from ppod_services.reward.functions.registry import make_function
from ppod_services.reward.kinds import FunctionConfig
from support.processes import ROOT

SOLVED = {"reference_pattern": r"####\s*(.+)"}
"""For references such as GSM8K's."""


@pytest.mark.parametrize(
    ("function", "parameters", "response", "reference", "expected"),
    [
        ("length", {"minimum": 2, "maximum": 4}, "abc", None, 0.0),
        ("length", {"minimum": 2, "maximum": 4}, "a", None, -1.0),
        ("length", {"maximum": 4, "per_unit": 0.5}, "abcdefg", None, -1.5),
        ("length", {"minimum": 3, "unit": "words"}, "  two words ", None, -1.0),
        ("length", {}, "anything at all", None, 0.0),
        ("regular_expression", {"pattern": r"\d+"}, "no 12", None, 1.0),
        ("regular_expression", {"pattern": r"\d+", "no_match": -2}, "none", None, -2.0),
        ("regular_expression", {"pattern": r"\d+", "mode": "full"}, "12 no", None, 0.0),
        (
            "regular_expression",
            {"pattern": "A", "mode": "count", "match": 0.5, "flags": ["ignore_case"]},
            "aXA",
            None,
            1.0,
        ),
        ("regular_expression", {"pattern": "^b$", "flags": ["multiline"]}, "a\nb", None, 1.0),
        ("exact_answer", {}, " the  answer\n", "the answer", 1.0),
        ("exact_answer", {}, "The answer", "the answer", 0.0),
        ("exact_answer", {"ignore_case": True}, "The answer", "the answer", 1.0),
        ("exact_answer", {"pattern": r"####\s*(.+)"}, "so 3\n#### 3\nno,\n#### 4", "4", 1.0),
        ("exact_answer", {"pattern": r"####\s*(.+)", "wrong": -1}, "it is 4", "4", -1.0),
        ("exact_answer", {"pattern": r"is (\d+)", **SOLVED}, "it is 4", "2 + 2 is 5, no, 4\n#### 4", 1.0),
        ("exact_answer", {"pattern": r"is (\d+)", **SOLVED}, "it is 5", "2 + 2 is 5, no, 4\n#### 4", 0.0),
        ("exact_answer", SOLVED, "4", "4", 1.0),
        ("exact_answer", {"numbers": True}, "1,000.0", "1000", 1.0),
        ("exact_answer", {"numbers": True}, "a thousand", "1000", 0.0),
        ("exact_answer", {"numbers": True}, "-1,234,567.50", "-1234567.5", 1.0),
        ("exact_answer", {"numbers": True}, "1,2", "12", 0.0),
        ("exact_answer", {"numbers": True}, "1,2", "1,2", 1.0),
        ("exact_answer", {"numbers": True}, "1234,567", "1234567", 0.0),
        ("exact_answer", {"numbers": True}, "1_2", "12", 0.0),
        # Neighbours that one float stands for.
        ("exact_answer", {"numbers": True}, "9,007,199,254,740,993", "9007199254740992", 0.0),
        ("exact_answer", {"numbers": True}, "9,007,199,254,740,993", "9007199254740993.0", 1.0),
        ("exact_answer", {"numbers": True}, "0.50", ".5", 1.0),
        ("exact_answer", {"numbers": True}, "sNaN", "7", 0.0),
        ("vader", {"figure": "neg"}, "the table is there", None, 0.0),
        ("vader", {"figure": "neu"}, "the table is there", None, 1.0),
    ],
)
def test_scores_by_hand(
    function: str, parameters: dict[str, object], response: str, reference: str | None, expected: float
) -> None:
    made = make_function(function, parameters)
    assert made.score(FunctionSample("a prompt that does not count", response, reference)) == expected


def test_vader_tells_praise_from_blame_by_the_lexicon() -> None:
    vader = make_function("vader", {})
    # The lexicon rates "good" 1.9; compound is s / sqrt(s^2 + 15), rounded to four digits.
    assert vader.score(FunctionSample("", "good")) == pytest.approx(1.9 / (1.9**2 + 15) ** 0.5, abs=1e-4)
    assert vader.score(FunctionSample("", "a terrible mess")) < -0.5


def test_every_function_of_ours_is_declared_to_other_packages() -> None:
    """Found by entry point alone: an entry that pyproject.toml lacks would be missed once ppod is installed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["ppod.rewards"]
    files = {path.stem for path in (ROOT / "services/ppod_services/reward/functions").glob("*.py")}
    assert set(declared) == files - {"__init__", "registry", "pool", "worker"}
    for value in declared.values():
        module, _, name = value.partition(":")
        assert (ROOT / "services" / f"{module.replace('.', '/')}.py").is_file()
        assert name


def children() -> set[int]:
    """Processes that this one has started."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


async def test_a_process_that_ended_while_it_was_idle_is_no_fault_of_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pool = FunctionPool(FunctionConfig(name="short", kind="function", function="length"))
    sample = [NumberedSample(0, FunctionSample("", "abc"))]
    before = children()
    try:
        assert await pool.score(sample, ANONYMOUS_CALLER) == [0.0]
        [worker] = children() - before
        os.kill(worker, signal.SIGKILL)
        # Not until the event loop has seen its end, too: the next request may come before.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        assert await pool.score(sample, ANONYMOUS_CALLER) == [0.0]
    finally:
        await pool.close()
    assert children() == before
