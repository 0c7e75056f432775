"""Alerts fire when they should, and only then, and each has a section of the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.processes import ROOT
from support.prometheus import needs_prometheus

MONITORING = ROOT / "deploy" / "monitoring"
RULE_FILES = sorted((MONITORING / "rules").glob("*.rules.yaml"))
TEST_FILES = sorted((MONITORING / "tests").glob("*.test.yaml"))


def rules() -> list[dict[str, Any]]:
    found = [yaml.safe_load(path.read_text()) for path in RULE_FILES]
    return [rule for one in found for group in one["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("promtool") or "promtool", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@needs_prometheus
def test_rules_are_sound() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_when_they_should_not() -> None:
    done = promtool("test", "rules", *TEST_FILES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_seen_to_fire_and_seen_not_to() -> None:
    expected: dict[str, set[bool]] = {}
    for path in TEST_FILES:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for one in test["alert_rule_test"]:
                expected.setdefault(one["alertname"], set()).add(bool(one["exp_alerts"]))
    assert expected == {name: {True, False} for name in ALERTS}


@needs_prometheus
@pytest.mark.parametrize("change", ["never", "at once"])
@pytest.mark.parametrize("path", RULE_FILES[1:], ids=lambda path: path.stem)
def test_a_rule_that_is_broken_fails_its_test(path: Path, change: str, tmp_path: Path) -> None:
    """Never: no alert of the file can fire. At once: none waits for its `for`. Every one of them is missed."""
    shutil.copytree(MONITORING / "rules", tmp_path / "rules")
    shutil.copytree(MONITORING / "tests", tmp_path / "tests")
    values = yaml.safe_load(path.read_text())
    for rule in (rule for group in values["groups"] for rule in group["rules"]):
        rule.update({"expr": f"({rule['expr']}) and vector(0) == 1"} if change == "never" else {"for": "0s"})
    (tmp_path / "rules" / path.name).write_text(yaml.safe_dump(values))
    done = promtool("test", "rules", tmp_path / "tests" / path.name.replace(".rules.", ".test."))
    assert done.returncode == 1
    broken = set(re.findall(r"alertname: (\w+), time", done.stdout + done.stderr))
    own = {rule["alert"] for group in values["groups"] for rule in group["rules"]}
    assert broken == own


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    runbook = (ROOT / "deploy" / "docs" / "runbook.md").read_text()
    anchors = [heading.lower() for heading in re.findall(r"^## (\w+)$", runbook, re.MULTILINE)]
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"deploy/docs/runbook.md#{name.lower()}"
        assert "for" in rule, name
    # One section each, and none of an alert that is gone.
    assert sorted(anchors) == sorted(name.lower() for name in ALERTS)
    for name in ALERTS:
        section = runbook.split(f"## {name}\n")[1].split("\n## ")[0]
        for part in ("**Means.**", "**Look at.**", "**Do.**"):
            assert part in section, f"{name}: {part}"
