"""The JSON that Grafana imports."""

from __future__ import annotations

from typing import Any

from scripts.dashboard.rows import ROWS, Panel

COLUMNS = 24
PICK = '{namespace=~"$namespace",node=~"$node",instance=~"$instance"}'


def dashboard() -> dict[str, Any]:
    """The document that Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            }
        )
        top += 1
        left = line = 0
        for panel in row:
            if left + panel.width > COLUMNS:
                left, top, line = 0, top + line, 0
            panels.append(_panel(panel, len(panels) + 1, left, top))
            left, line = left + panel.width, max(line, panel.height)
        top += line
    return {
        "uid": "kvservice",
        "title": "kvservice",
        "description": "KV blocks of conversations: hits, tiers, look-ahead, engines, cost.",
        "tags": ["kvservice", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.is_stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": panel.height, "w": panel.width, "x": left, "y": top},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "expr": query.replace("{*", PICK[:-1]),
                "legendFormat": legend,
                "range": True,
            }
            for position, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    chosen = {"text": "All", "value": "$__all"}
    narrowing = ""
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    for label in ("namespace", "node", "instance"):
        query = f"label_values(kvservice_build_info{{{narrowing}}}, {label})"
        variables.append(
            {
                "name": label,
                "label": label.capitalize(),
                "type": "query",
                "datasource": source,
                "query": query,
                "definition": query,
                "includeAll": True,
                "allValue": ".*",
                "multi": True,
                "refresh": 2,
                "sort": 1,
                "current": chosen,
            }
        )
        narrowing += f'{", " if narrowing else ""}{label}=~"${label}"'
    return variables
