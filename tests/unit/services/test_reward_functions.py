"""The reward functions that ppod carries, by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import uvloop

from ppod.errors import RewardFailed
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


@pytest.mark.parametrize("how", ["fork", "run"])
async def test_what_a_late_function_started_ends_with_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the code of a response that loops for ever. A child that was forked has the function's pipes, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pool = FunctionPool(FunctionConfig(name="late", kind="function", function="test_scripted", timeout_s=2))
    try:
        late = pool.score([NumberedSample(0, FunctionSample("", f"{how} {tmp_path / 'pid'}"))], ANONYMOUS_CALLER)
        with pytest.raises(RewardFailed, match="no score after 2 s"):
            await asyncio.wait_for(late, 20)
        started = int((tmp_path / "pid").read_text())
        until = time.monotonic() + 5
        while Path(f"/proc/{started}").exists() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        assert not Path(f"/proc/{started}").exists()
        # The place is free, and another process is in it.
        assert await pool.score([NumberedSample(0, FunctionSample("", "2"))], ANONYMOUS_CALLER) == [2.0]
    finally:
        await pool.close()


async def test_what_a_function_runs_does_not_read_the_next_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pool = FunctionPool(FunctionConfig(name="asking", kind="function", function="test_scripted"))
    texts = ["ask", *map(str, range(20))]
    samples = [NumberedSample(index, FunctionSample("", text)) for index, text in enumerate(texts)]
    try:
        assert await pool.score(samples, ANONYMOUS_CALLER) == [0.0, *map(float, range(20))]
    finally:
        await pool.close()


async def test_what_a_function_started_ends_with_the_service(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ppod_services.reward.functions.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    leave = {"samples": [["", f"leave {tmp_path / 'pid'}", None]], "limit_s": 20}
    for message in ({"function": "test_scripted", "parameters": {}}, leave):
        worker.stdin.write(json.dumps(message).encode() + b"\n")
        assert await worker.stdout.readline()
    started = int((tmp_path / "pid").read_text())
    worker.stdin.close()
    await asyncio.wait_for(worker.wait(), 20)
    until = time.monotonic() + 5
    while Path(f"/proc/{started}").exists() and time.monotonic() < until:
        await asyncio.sleep(0.05)
    assert not Path(f"/proc/{started}").exists()


_FORKS = """
import importlib, os, sys, time
importlib.import_module(sys.argv[1])
import grpc
call = grpc.insecure_channel("127.0.0.1:9").unary_unary("/a/b").future(b"", wait_for_ready=True)
time.sleep(0.5)  # until it is under way
child = os.fork()
os._exit(os.waitpid(child, 0)[1] if child else 0)
"""


@pytest.mark.parametrize("package", ["ppod_services", "ppod_trainer"])
def test_grpc_leaves_children_alone(package: str) -> None:
    """Its handlers would say here that they are skipped; where they are not, a child may crash in them."""
    command = [sys.executable, "-c", _FORKS, package]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_ends_at_once_fails_its_batch_and_not_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """By uvloop, as services have it, which closes the pipe to it."""
    start = asyncio.create_subprocess_exec

    async def start_and_end(*_: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(sys.executable, "-c", "raise SystemExit(7)", **options)
        await process.wait()
        return process

    async def score() -> None:
        pool = FunctionPool(FunctionConfig(name="short", kind="function", function="length"))
        await pool.score([NumberedSample(3, FunctionSample("", "abc", None))], ANONYMOUS_CALLER)

    monkeypatch.setattr("asyncio.create_subprocess_exec", start_and_end)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, pytest.raises(RewardFailed, match="exit code 7"):
        runner.run(score())
