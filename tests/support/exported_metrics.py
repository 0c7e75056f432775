"""The metrics that the code exports, and those that an expression of PromQL asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry

from ppod_services.core.metrics import ServiceMetrics
from ppod_trainer.config import MetricsConfig
from ppod_trainer.metrics import MetricsLog

SCRAPED = frozenset({"namespace", "pod", "component", "job", "instance"})
"""Labels that Prometheus adds, by the monitors' relabelling or by itself."""
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_SELECTOR = re.compile(r"\b(?P<name>(?:ppod_|[a-z]+:ppod_)[a-z0-9_:]*|up)\b(?:\{(?P<labels>[^}]*)\})?")
_LABEL = re.compile(r"([a-zA-Z_]+)\s*(?:=~|!~|!=|=)")

Metrics = Mapping[str, frozenset[str]]


def _of_registry(registry: CollectorRegistry) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    # The labels of a family without samples are known to its collector only.
    for collector in registry._collector_to_names:
        labels = frozenset(getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            for suffix in _SUFFIXES[family.type]:
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def exported() -> Metrics:
    """Every series that services and trainer export, with its labels."""
    with TemporaryDirectory() as directory:
        log = MetricsLog(Path(directory), MetricsConfig(port=None, tensorboard=False))
        log.close()
    return {**_of_registry(ServiceMetrics().registry), **_of_registry(log.registry), "up": frozenset()}


def asked(expression: str) -> list[tuple[str, frozenset[str]]]:
    """Series that an expression names, each with the labels that it is selected by."""
    without_groups = re.sub(r"\b(by|on|ignoring|group_left|group_right|without)\s*\([^)]*\)", "", expression)
    matches = _SELECTOR.finditer(without_groups)
    return [(one["name"], frozenset(_LABEL.findall(one["labels"] or ""))) for one in matches]
