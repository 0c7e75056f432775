"""A run whose services are all shared by teams: it samples as one of them, and pushes as an administrator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

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


def test_a_run_waits_until_its_teams_quota_has_room(
    shared: System, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that takes longer than a call may: the service tells when to come back."""
    for variable, name in {"PPOD_TOKEN": "policy", "PPOD_ADMIN_TOKEN": "operations"}.items():
        monkeypatch.setenv(variable, name)
    teams = tmp_path / "teams.yaml"
    quota = {**holder("policy"), "tokens_per_s": 25, "burst_s": 12}
    teams.write_text(yaml.safe_dump({"teams": [quota], "administrators": [holder("operations")]}))
    model, heads = tiny_model_config(tiny_model_dir), (shared.directory / "reward", shared.directory / "judge")
    values = {
        "rewards": [{"name": head.name, "model": model, "head": str(head)} for head in heads],
        "tenancy": {"teams_file": str(teams)},
    }
    with running_service("ppod_services.reward", tmp_path, values) as reward:
        config = replace(shared, reward=reward).config("quota", steps=1)
        services = {**cast("dict[str, object]", config["services"]), "timeout_s": 3, "recovery_timeout_s": 60}
        result = shared.train({**config, "services": services})
    assert result.returncode == 0, result.stderr
    assert "quota" in result.stderr, "it was never refused"
