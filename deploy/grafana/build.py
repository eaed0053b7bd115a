"""Makes dashboard.json, the fleet in Grafana, of panels.toml. After a change there: python deploy/grafana/build.py"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PLACE = Path(__file__).with_name("dashboard.json")
PANELS = Path(__file__).with_name("panels.toml")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
GRID_WIDTH = 24  # Grafana's
SIZES = {"row": (24, 1), "stat": (4, 4), "timeseries": (8, 8)}  # width and height in its grid
MODELS = "label_values(zfleet_tasks_submitted_total, model)"


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's format."""
    rows = tomllib.loads(PANELS.read_text("utf-8"))["row"]
    return {
        "uid": "zfleet",
        "title": "zfleet",
        "description": "The fleet at a glance: what waits, what is made, and what goes wrong.",
        "tags": ["zfleet"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_sources(), _models()]},
        "annotations": {"list": []},
        "links": [],
        "panels": list(_placed(rows)),
    }


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def _placed(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every panel in its place: left to right, then on the next line."""
    number = x = y = height = 0
    for row in rows:
        heading = {"kind": "row", "title": row["title"]}
        for panel in (heading, *row["panel"]):
            kind = panel.get("kind", "timeseries")
            width = SIZES[kind][0]
            if x + width > GRID_WIDTH or kind == "row":
                x, y = 0, y + height
            height = SIZES[kind][1]
            number += 1
            yield {"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **_panel(kind, panel)}
            x += width


def _panel(kind: str, panel: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "row":
        return {"type": "row", "title": panel["title"], "collapsed": False, "panels": []}
    return {
        "type": kind,
        "title": panel["title"],
        "description": panel.get("about", ""),
        "datasource": SOURCE,
        "fieldConfig": {"defaults": _field(kind, panel), "overrides": []},
        "options": _options(kind),
        "targets": [
            {"refId": letter, "datasource": SOURCE, "editorMode": "code", "expr": query, "legendFormat": legend}
            for letter, (legend, query) in zip("ABCD", panel["queries"].items(), strict=False)
        ],
    }


def _field(kind: str, panel: Mapping[str, Any]) -> dict[str, Any]:
    below, above = ("red", "green") if panel.get("low") else ("green", "red")
    steps: list[dict[str, Any]] = [{"color": below, "value": None}]
    if "alarm" in panel:
        steps.append({"color": above, "value": panel["alarm"]})
    field: dict[str, Any] = {
        "unit": panel.get("unit", "none"),
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if "top" in panel:
        field["max"] = panel["top"]
    if "words" in panel:
        words = {value: {"text": word, "index": at} for at, (value, word) in enumerate(panel["words"].items())}
        field["mappings"] = [{"type": "value", "options": words}]
    if kind == "timeseries":
        stacked = panel.get("stacked", False)
        field["custom"] = {
            "fillOpacity": 20 if stacked else 0,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if "alarm" in panel else "off"},
        }
    return field


def _options(kind: str) -> dict[str, Any]:
    if kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value"}
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _sources() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _models() -> dict[str, Any]:
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": MODELS, "refId": "models"},
        "refresh": 2,  # as the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "sort": 1,
        "hide": 0,
    }


if __name__ == "__main__":
    PLACE.write_text(text(), "utf-8")
