"""Panels of Grafana dashboards: what they show, and the JSON that Grafana reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

_COLUMNS = 3
_WIDTH = 24 // _COLUMNS
_HEIGHT = 8
_DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """One line, or family of lines.

    Attributes:
        expression: PromQL; `$namespace` is the dashboard's.
        legend: with labels in double braces.
    """

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart over time.

    Attributes:
        title: what it shows.
        queries: its lines.
        unit: Grafana's name of the unit; `short` for plain numbers.
        description: how to read it.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    description: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page.

    Attributes:
        uid: its name in Grafana's links and in the file's name.
        title: heading.
        rows: from above.
    """

    uid: str
    title: str
    rows: tuple[Row, ...]


def to_json(dashboard: Dashboard) -> Json:
    """What Grafana imports."""
    panels: list[Json] = []
    top = 0
    for row in dashboard.rows:
        panels.append(_row(row.title, len(panels) + 1, top))
        top += 1
        for index, panel in enumerate(row.panels):
            at = (index % _COLUMNS * _WIDTH, top + index // _COLUMNS * _HEIGHT)
            panels.append(_panel(panel, len(panels) + 1, at))
        top += -(-len(row.panels) // _COLUMNS) * _HEIGHT
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["ppod"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "tags": ["ppod"], "title": "ppod", "asDropdown": True, "keepTime": True}],
        "templating": {"list": [_datasource_variable(), _namespace_variable()]},
        "panels": panels,
    }


def _row(title: str, number: int, top: int) -> Json:
    at: Json = {"x": 0, "y": top, "w": 24, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": at, "panels": []}


def _panel(panel: Panel, number: int, at: tuple[int, int]) -> Json:
    targets: list[Json] = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query.expression,
            "legendFormat": query.legend,
            "range": True,
        }
        for index, query in enumerate(panel.queries)
    ]
    style: Json = {"lineWidth": 1, "fillOpacity": 5}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": {"x": at[0], "y": at[1], "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": style}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _datasource_variable() -> Json:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _namespace_variable() -> Json:
    return {
        "name": "namespace",
        "label": "Namespace",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": "label_values(ppod_ready, namespace)", "refId": "namespaces"},
        "refresh": 2,
        "sort": 1,
    }
