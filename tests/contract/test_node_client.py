"""A client in another language, made from the .proto files alone: installed with npm and run against real services."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppod import ResourceExhausted, RewardClient, Truncation
from support.processes import ROOT, ServiceProcess
from support.scripted_services import Script, scripted_server

EXAMPLE = ROOT / "protos" / "examples" / "node"
TEXTS = ["a", "täxt", "a longer text of which every byte is a token"]


def node_directory() -> Path:
    """Where node and npm are: on the path, or in the wheel that the type checker brings."""
    beside = Path(sys.executable).parent
    for directory in (shutil.which("node"), beside / "node"):
        if directory is not None and Path(directory).exists() and (Path(directory).parent / "npm").exists():
            return Path(directory).parent
    pytest.fail(f"neither the path nor {beside} has node and npm; install the `dev` extra")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed; its protos are elsewhere."""
    directory = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", ".npmrc", "score.mjs", "error_details.proto"):
        shutil.copy(EXAMPLE / name, directory / name)
    # No scripts: a package of others must not run code here.
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return directory


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.pathsep.join([str(node_directory()), os.environ["PATH"]])}


def run(example: Path, target: str, *arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    command = ["node", "score.mjs", "--target", target, "--protos", str(ROOT / "protos"), *arguments]
    return subprocess.run(
        command,
        cwd=example,
        env={**environment(), "PPOD_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_lock_file_names_no_registry() -> None:
    lock = (EXAMPLE / "package-lock.json").read_text()
    assert '"integrity"' in lock
    assert "resolved" not in lock
    assert re.search(r"https?://[^\"]*(registry|npm)", lock) is None


def test_scores_equal_those_of_the_python_client(example: Path, reward_service: ServiceProcess) -> None:
    done = run(example, reward_service.target, *TEXTS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with RewardClient(reward_service.target) as client:
        expected = client.score_texts(TEXTS, truncation=Truncation.RIGHT)
        by_tokens = client.score([[1, 2, 3], [250]])
    # JSON carries a float32 as the double that it equals.
    np.testing.assert_array_equal(np.asarray(found["scores"], np.float32), expected.values)
    assert found["truncated_tokens"] == list(expected.truncated_tokens)
    assert (found["model"], int(found["weight_version"])) == (expected.state.model, expected.state.weight_version)
    done = run(example, reward_service.target, "--tokens", "[[1, 2, 3], [250]]")
    np.testing.assert_array_equal(np.asarray(json.loads(done.stdout)["scores"], np.float32), by_tokens.values)


def test_typed_errors_arrive(example: Path, reward_service: ServiceProcess) -> None:
    done = run(example, reward_service.target, "--tokens", "[[1], [320]]")
    assert done.returncode == 1
    error = json.loads(done.stderr)
    assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "InvalidArgument")
    assert (error["field"], error["sample"]) == ("tokens.token_ids", "1")
    assert "320" in error["found"]
    done = run(example, reward_service.target, "--model", "nobody", "a")
    error = json.loads(done.stderr)
    assert (error["code"], error["reason"], error["found"]) == ("NOT_FOUND", "NotFound", "nobody")


def test_a_wait_that_was_asked_for_is_waited(example: Path) -> None:
    def refuse_once(_: object, number: int) -> None:
        if number == 1:
            raise ResourceExhausted("the queue is full", 0.4)

    script = Script(refuse_once)
    with scripted_server(script) as server:
        done = run(example, server.target, "ab", token="secret")
    assert done.returncode == 0, done.stderr
    assert len(script.requests) == 2
    assert [each["authorization"] for each in script.metadata] == ["Bearer secret"] * 2
    assert len({request.request_id for request in script.requests}) == 1  # pyright: ignore
