"""A run whose services are all shared by teams: it samples as one of them, and pushes as an administrator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_head import save_tiny_head

from .conftest import System


def holder(name: str) -> dict[str, object]:
    """Whose token is its name."""
    return {"name": name, "token_sha256": [hashlib.sha256(name.encode()).hexdigest()]}


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("teams")
    (directory / "prompts.txt").write_text("\n".join(f"{index:02d} is it" for index in range(60)))
    teams = directory / "teams.yaml"
    teams.write_text(yaml.safe_dump({"teams": [holder("policy")], "administrators": [holder("operations")]}))
    tenancy = {"tenancy": {"teams_file": str(teams)}}
    model = tiny_model_config(tiny_model_dir)
    head = save_tiny_head(tiny_model_dir, directory / "reward", name="reward", seed=0)
    judge = save_tiny_head(tiny_model_dir, directory / "judge", name="judge", seed=1)
    rewards = [{"name": path.name, "model": model, "head": str(path)} for path in (head, judge)]
    with ExitStack() as stack:
        reward, reference, generation = (
            stack.enter_context(running_service(f"ppod_services.{name}", directory, {**values, **tenancy}))
            for name, values in (
                ("reward", {"rewards": rewards}),
                ("reference", {"model": model}),
                ("generation", {"model": model}),
            )
        )
        yield System(reward, reference, generation, tiny_model_dir, directory)


def test_a_run_has_a_teams_token_and_an_administrators(shared: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOD_TOKEN", "policy")
    monkeypatch.setenv("PPOD_ADMIN_TOKEN", "operations")
    result = shared.train(shared.config("both", steps=3, reference_refresh_steps=1))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the reference is now the policy") == 2


@pytest.mark.parametrize("missing", ["PPOD_TOKEN", "PPOD_ADMIN_TOKEN"])
def test_one_token_does_not_do_for_both(shared: System, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    tokens = {"PPOD_TOKEN": "policy", "PPOD_ADMIN_TOKEN": "operations"}
    for name, token in tokens.items():
        if name != missing:
            monkeypatch.setenv(name, token)
    result = shared.train(shared.config(missing, steps=1))
    assert result.returncode != 0
    assert "token" in result.stderr
