"""Writes what is made of other files here: dashboards/*.json, and prometheus-rules.yaml of rules/*.yaml.

`make monitoring` runs it; with --check it writes nothing, and fails where a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from monitoring.dashboards import ALL
from monitoring.panels import to_json

HERE = Path(__file__).resolve().parent
_HEAD = "# Made of rules/*.rules.yaml by `make monitoring`; change those.\n"


def generated() -> dict[Path, str]:
    """The content of every generated file."""
    files = {
        HERE / "dashboards" / f"{one.uid}.json": json.dumps(to_json(one), indent=2, ensure_ascii=False) + "\n"
        for one in ALL
    }
    return files | {HERE / "prometheus-rules.yaml": _prometheus_rules()}


def _prometheus_rules() -> str:
    groups: list[object] = []
    for path in sorted((HERE / "rules").glob("*.rules.yaml")):
        groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "ppod",
            "namespace": "ppod",
            "labels": {"app.kubernetes.io/name": "ppod", "app.kubernetes.io/part-of": "ppod"},
        },
        "spec": {"groups": groups},
    }
    return _HEAD + yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=120)


def main() -> int:
    """Write, or check, all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    check: bool = parser.parse_args().check
    stale = [path for path, text in generated().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(HERE)}: {'out of date, run make monitoring' if check else 'written'}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(generated()[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
