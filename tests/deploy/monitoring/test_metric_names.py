"""Every query in rules, dashboards and autoscalers names series and labels that the code exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import grpc
import pytest
import yaml
from prometheus_client import CollectorRegistry

from deploy.manifests.configurations import trainer_configuration
from monitoring.generate import generated
from ppod_services.core.admission import Refusal
from ppod_services.core.config import LimitsConfig
from ppod_services.core.metrics import ServiceMetrics
from ppod_trainer.config import MetricsConfig, TroubleKind
from ppod_trainer.metrics import MetricsLog
from support.exported_metrics import SCRAPED, asked, exported
from support.manifests import KUSTOMIZE, combined, of_kind, overlay, workload
from support.processes import ROOT
from support.prometheus import needs_prometheus

from .test_rules import RULE_FILES, TEST_FILES, promtool, rules

EXPORTED = exported()
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def dashboard_queries() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "deploy" / "monitoring" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.stem}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.stem}: ${variable['name']}", variable["query"]["query"]


def rule_queries() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]


def scaling_queries(directory: Path) -> Iterator[tuple[str, str]]:
    hpa = of_kind(combined(directory / "hpa", "base", ("hpa",)), "HorizontalPodAutoscaler")["ppod-reward"]
    for metric in hpa["spec"]["metrics"]:
        yield "hpa", metric["pods"]["metric"]["name"]
    adapter = yaml.safe_load((KUSTOMIZE / "components" / "hpa" / "prometheus-adapter-values.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        yield "prometheus-adapter", rule["seriesQuery"]
        assert rule["name"]["as"] in [metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]]
    scaled = of_kind(combined(directory / "keda", "base", ("keda",)), "ScaledObject")["ppod-reward"]
    for trigger in scaled["spec"]["triggers"]:
        yield "keda", trigger["metadata"]["query"]


def faults(where: str, expression: str) -> list[str]:
    found = asked(expression)
    problems = [] if found else [f"{where}: asks for nothing of ppod's"]
    for name, labels in found:
        if name in RECORDED:
            continue
        if name not in EXPORTED:
            problems.append(f"{where}: nothing exports {name}")
        elif unknown := labels - EXPORTED[name] - SCRAPED:
            problems.append(f"{where}: {name} has no label {', '.join(sorted(unknown))}")
    return problems


def test_every_query_names_what_is_exported(tmp_path: Path) -> None:
    queries = [*dashboard_queries(), *rule_queries(), *scaling_queries(tmp_path)]
    assert len(queries) > 80
    assert [fault for where, expression in queries for fault in faults(where, expression)] == []


def last_bound_s(registry: CollectorRegistry, name: str) -> float:
    """The last finite bound of a histogram, beyond which no percentile of it is told."""
    [family] = [one for one in registry.collect() if one.name == name]
    return sorted(float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels)[-2]


def test_percentiles_of_calls_reach_to_their_deadlines(tmp_path: Path) -> None:
    trainer, service = MetricsLog(tmp_path, MetricsConfig(port=None, tensorboard=False)), ServiceMetrics()
    trainer.observe_rpc("Generate", 1.0, "OK")
    trainer.close()
    service.rpc("Generate", "", "OK", 1.0)
    objects = overlay("gpu")
    timeout_s = trainer_configuration(objects, workload(objects, "trainer")).services.timeout_s
    assert last_bound_s(trainer.registry, "ppod_client_rpc_seconds") >= timeout_s
    assert last_bound_s(service.registry, "ppod_rpc_seconds") >= LimitsConfig().default_deadline_s


def test_labels_of_groups_and_legends_are_exported() -> None:
    known = SCRAPED.union(*EXPORTED.values())
    for where, expression in (*dashboard_queries(), *rule_queries()):
        for labels in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expression):
            assert {one.strip() for one in labels.split(",")} <= known, where
    for path in sorted((ROOT / "deploy" / "monitoring" / "dashboards").glob("*.json")):
        assert set(re.findall(r"\{\{(\w+)\}\}", path.read_text())) <= known, path.name
    for rule in rules():
        assert set(re.findall(r"\$labels\.(\w+)", str(rule.get("annotations", "")))) <= known, rule


@needs_prometheus
def test_every_query_can_be_read_by_prometheus(tmp_path: Path) -> None:
    queries = [*dashboard_queries(), *scaling_queries(tmp_path)]
    expressions = [
        expression.replace("$__rate_interval", "1m")
        for _, expression in queries
        if not expression.startswith("label_values(")
    ]
    rules = [{"record": f"query_{number}", "expr": text} for number, text in enumerate(expressions)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text(path.read_text().replace("sum by", "sum buy"))
    assert promtool("check", "rules", path).returncode == 1


def test_label_values_are_those_of_the_code() -> None:
    known = {
        "reason": set(Refusal),
        "kind": set(get_args(TroubleKind)),
        "code": {code.name for code in grpc.StatusCode},
        "component": {"reward", "reference", "generation", "trainer"},
        "phase": {"step"},
        "namespace": {"$namespace"},
    }
    values = re.compile(r'([a-z]+)(?:=~|!~|!=|=)"([^"]*)"')
    for where, expression in (*dashboard_queries(), *rule_queries()):
        for label, text in values.findall(expression):
            assert set(text.split("|")) <= known[label], f"{where}: {label}"


def test_promtool_s_input_series_are_exported() -> None:
    """A test of rules on invented metrics would show nothing."""
    for path in TEST_FILES:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for series in test["input_series"]:
                assert faults(path.stem, series["series"]) == [] or series["series"].startswith("up{")


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(ppod_rpcs_total[5m])", "nothing exports ppod_rpcs_total"),
        ('ppod_rpc_total{status="OK"}', "ppod_rpc_total has no label status"),
        ("ppod_rpc_seconds > 1", "nothing exports ppod_rpc_seconds"),
        ("vector(1)", "asks for nothing"),
    ],
)
def test_a_query_for_what_is_not_exported_is_found(expression: str, fault: str) -> None:
    [found] = faults("here", expression)
    assert fault in found


def test_generated_files_are_up_to_date() -> None:
    """`make monitoring` writes them."""
    for path, text in generated().items():
        assert path.read_text() == text, f"{path.name} is out of date"
    assert {path.name for path in generated()} >= {
        path.name for path in (ROOT / "deploy" / "monitoring" / "dashboards").iterdir()
    }


def test_the_manifest_holds_the_very_rules_of_the_files(tmp_path: Path) -> None:
    [manifest] = of_kind(combined(tmp_path, "base", ("monitoring",)), "PrometheusRule").values()
    written = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    assert manifest["spec"]["groups"] == written


def test_grafana_s_sidecar_finds_every_dashboard(tmp_path: Path) -> None:
    dashboards = of_kind(combined(tmp_path, "base", ("monitoring",)), "ConfigMap")["ppod-dashboards"]
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    for name, text in dashboards["data"].items():
        assert f"{json.loads(text)['uid']}.json" == name
        positions = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in json.loads(text)["panels"]]
        assert len(set(positions)) == len(positions), f"{name}: panels lie on each other"
