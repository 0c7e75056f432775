"""Documentation: links lead somewhere, and what it names is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from ppod_deploy.overrides import Override, apply_overrides
from ppod_services.core.config import CausalServiceConfig
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.reward.config import RewardServiceConfig
from ppod_trainer.config import AdvantagesConfig, TrainerConfig, configuration_fingerprint
from ppod_trainer.config.advantages import LEAVES_OUT_KL, NEEDS_CRITIC, NEEDS_GROUPS
from support.manifests import COMPONENTS, KUSTOMIZE, OVERLAYS, SCALERS
from support.processes import ROOT

PAGES = [ROOT / "deploy" / "README.md", *sorted((ROOT / "deploy" / "docs").glob("*.md"))]
FOLDERS = ("deploy", "docker", "protos", "services", "tests", "trainer")
ALL_PAGES = [ROOT / "README.md", *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
CONFIGURATIONS = (TrainerConfig, CausalServiceConfig, GenerationServiceConfig, RewardServiceConfig)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found), f"{target}#{anchor}"


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one


def _has(model: type[BaseModel], path: list[str]) -> bool:
    if path[0] not in model.model_fields:
        return False
    inner = list(_sections(model.model_fields[path[0]].annotation))
    return len(path) == 1 or any(_has(one, path[1:]) for one in inner)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "trainer" / "README.md"], ids=_name)
def test_keys_of_configurations_are_there(page: Path) -> None:
    """A dotted name in code whose first part is a section of a configuration is a key of it."""
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", page.read_text()):
        path = name.split(".")
        is_file = path[-1] in ("crt", "key", "yaml", "md", "jsonl")
        if not is_file and any(path[0] in model.model_fields for model in CONFIGURATIONS):
            assert any(_has(model, path) for model in CONFIGURATIONS), name


def test_the_readme_names_every_overlay_and_component() -> None:
    readme = PAGES[0].read_text()
    scalers = tuple(scaler for scaler in SCALERS if scaler)
    assert {path.name for path in (KUSTOMIZE / "overlays").iterdir()} == set(OVERLAYS)
    assert {path.name for path in (KUSTOMIZE / "components").iterdir()} == {*COMPONENTS, *scalers}
    for name in (*OVERLAYS, *COMPONENTS, *scalers):
        assert re.search(rf"^\|[^|]*`{name}`", readme, re.MULTILINE), name


def test_commands_name_objects_that_are_there() -> None:
    names = {"ppod-reward", "ppod-reference", "ppod-generation", "ppod-trainer", "ppod-NAME"}
    for page in PAGES:
        for kind, name in re.findall(r"\b(deploy|job)[/ ](ppod-\w+)", page.read_text()):
            assert name in names, f"{page.name}: {kind}/{name}"


def test_rollouts_are_of_an_object() -> None:
    for page in PAGES:
        for command in re.findall(r"kubectl (?:-\S+ \S+ )?rollout \w+([^`\n]*)", page.read_text()):
            assert re.match(r" deploy(ment)?/ppod-\w+", command), f"{page.name}: {command}"


def test_what_is_left_behind_is_looked_for_among_all_kinds() -> None:
    """`kubectl get all` is workloads and Services, and lists nothing else."""
    for page in PAGES:
        assert not re.search(r"kubectl (?:-\S+ \S+ )?get all\b", page.read_text()), page.name


def test_a_run_is_over_when_the_command_that_ends_it_returns() -> None:
    """By itself kubectl waits for the Job alone, and not for its pods, beside which no other trainer may begin."""
    for page in PAGES:
        text = " ".join(page.read_text().split())
        commands = re.findall(r"`[^`]*delete (?:job|jobset) [^`]*`", text)
        assert [one for one in commands if "--cascade=foreground" not in one] == [], page.name


def test_logs_are_read_of_all_replicas_and_to_their_end() -> None:
    """kubectl picks one pod of a Deployment, and shows ten lines of each pod with a label unless it is told more."""
    for page in PAGES:
        commands = re.findall(r"kubectl (?:-\S+ \S+ )?logs (?:[^`\n\\]|\\\n)*", page.read_text())
        for command in commands:
            assert " deploy/" not in command, f"{page.name}: {command}"
            assert "--tail=-1" in command or " -l " not in command, f"{page.name}: {command}"


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs Debian's package jq, which .ci/system-packages installs")
def test_what_reads_logs_goes_on_past_lines_of_plain_text() -> None:
    """As of libraries, and of a service that cannot start."""
    refused: dict[str, object] = {"level": "info", "event": "call", "code": "UNAUTHENTICATED"}
    broken: dict[str, object] = {"level": "error", "event": "call_broke", "code": "INTERNAL"}
    file: dict[str, object] = {"level": "error", "event": "teams_file_refused"}
    log = "\n".join((json.dumps(refused), "ppod reward: a line of text", json.dumps(broken), json.dumps(file)))
    shown: list[object] = []
    for page in PAGES:
        for arguments in re.findall(r"\| (jq .*')", page.read_text()):
            done = subprocess.run(
                ["jq", "-c", *shlex.split(arguments)[1:]], input=log, capture_output=True, text=True, check=True
            )
            shown.append([json.loads(line) for line in done.stdout.splitlines()])
    assert shown == [["ppod reward: a line of text", broken, file], [broken], [file], [refused]]


def test_what_is_created_by_server_side_apply_may_be_created() -> None:
    """The API server asks for `create` beside `patch`, where the object is not there yet."""
    permissions = (ROOT / "deploy" / "docs" / "k8s-command.md").read_text().split("## Permissions")[1]
    rights = {row.split()[0].rstrip(","): row for row in permissions.splitlines() if row.startswith("    ")}
    assert set(rights) == {"up", "status", "scale", "logs", "train"}
    assert {name for name in rights if re.search(r"\bcreate\b", rights[name])} == {"up", "train"}


def test_every_make_target_that_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ALL_PAGES:
        named = set(re.findall(r"`make ([a-z-]+)|^    make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert {one or other for one, other in named} <= targets, page.name


def test_the_example_of_a_teams_file_is_one_that_the_service_takes() -> None:
    from ppod_services.core.teams_file import load_roster  # noqa: PLC0415

    roster = load_roster(KUSTOMIZE / "components" / "teams" / "teams.example.yaml")
    assert {team.name for _, team in roster.holders} == {"search", "trainer", "administrator"}


def test_the_runbook_asks_for_no_resume_that_the_trainer_refuses() -> None:
    """A checkpoint takes the configuration that made it alone: who changes the course of training begins anew."""
    changed = TrainerConfig.model_validate({"kl": {"coefficient": 0.5}})
    assert configuration_fingerprint(changed) != configuration_fingerprint(TrainerConfig())
    training = (ROOT / "deploy" / "docs" / "runbook.md").read_text().split("\n# ")[1]
    introduction, *sections = training.split("\n## ")
    advice = [section.split("**Do.**")[1] for section in sections]
    changing = [done for done in advice if re.search(r"`(kl|optimizer|policy|ppo|rewards|rollout)\.", done)]
    assert len(changing) > 3
    assert [done for done in changing if re.search(r"\bgo on\s+from\b", done)] == []
    assert re.search(r"\bnew\s+run\b", introduction)


ALGORITHMS = ROOT / "trainer" / "ppod_trainer" / "algorithms" / "README.md"


def _rows(page: Path, header: str) -> list[list[str]]:
    """The cells of the rows of a table."""
    table = page.read_text().split(header)[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def _recipes() -> dict[str, list[Override]]:
    """The keys of each paper's recipe, behind those of the one that it builds on."""
    found: dict[str, list[Override]] = {}
    for name, keys in _rows(ALGORITHMS, "| recipe | keys |"):
        base = re.match(r"as (\w+)", keys)
        found[name] = list(found[base[1]]) if base else []
        for key in re.findall(r"`([^`]+)`", keys):
            path, _, text = key.replace("<rollout.max_tokens>", "24").partition(": ")
            value = yaml.safe_load(text) if text else {"name": "calculator"} if path == "environment" else {}
            inner = value if isinstance(value, dict) and text else {"": value}
            found[name] += [Override((*path.split("."), *filter(None, [one])), inner[one]) for one in inner]
    return found


@pytest.mark.parametrize("keys", [pytest.param(keys, id=name) for name, keys in _recipes().items()])
def test_each_paper_s_recipe_is_one_that_the_trainer_takes(keys: list[Override]) -> None:
    assert keys
    TrainerConfig.model_validate(apply_overrides({}, keys))


def test_tables_of_algorithms_tell_what_each_needs() -> None:
    kinds = set(get_args(AdvantagesConfig.model_fields["kind"].annotation))
    algorithms = {row[0].strip("`"): row for row in _rows(ALGORITHMS, "| whitened by default |")}
    assert algorithms.keys() == kinds
    for kind, (_, _, critic, samples, penalty, whitened) in algorithms.items():
        needs = (
            kind in NEEDS_CRITIC,
            kind in NEEDS_GROUPS,
            kind in LEAVES_OUT_KL,
            AdvantagesConfig.model_validate({"kind": kind}).whiten,
        )
        assert (critic == "yes", samples == "2 or more", penalty != "any", whitened == "yes") == needs, kind
    trainer = {
        kind: needs
        for cells, needs, _ in _rows(ROOT / "trainer" / "README.md", "| kind | needs | keys |")
        for kind in re.findall(r"`(\w+)`", cells)
    }
    assert trainer.keys() == kinds
    for kind, needs in trainer.items():
        assert ("critic" in needs, "samples_per_prompt" in needs) == (kind in NEEDS_CRITIC, kind in NEEDS_GROUPS), kind
