"""Write what is derived for Prometheus Operator and Grafana: prometheusrule.yaml from alerts.yaml, and the dashboard.

A test compares what is committed with what this would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scripts.dashboard import dashboard

FOLDER = Path(__file__).resolve().parent.parent / "k8s" / "monitoring"
ALERTS = FOLDER / "alerts.yaml"
RULE = FOLDER / "prometheusrule.yaml"
DASHBOARD = FOLDER / "dashboard.json"
RUNBOOKS = "docs/OPERATIONS.md"


def files() -> dict[Path, str]:
    """Each file and its text."""
    return {RULE: prometheus_rule(), DASHBOARD: json.dumps(dashboard(), indent=1) + "\n"}


def alert_groups() -> list[dict[str, Any]]:
    """The groups of alerts.yaml."""
    groups: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return groups


def prometheus_rule() -> str:
    """The same groups as an object of the Prometheus Operator, each alert with its runbook."""
    groups = alert_groups()
    for group in groups:
        for rule in group["rules"]:
            rule["annotations"]["runbook"] = f"{RUNBOOKS}#{rule['alert'].lower()}"
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "kvservice", "labels": {"app.kubernetes.io/name": "kvservice"}},
        "spec": {"groups": groups},
    }
    head = "# Generated from alerts.yaml by scripts/generate_monitoring.py; edit there.\n"
    return head + yaml.safe_dump(rule, sort_keys=False, width=120)


def main() -> None:
    """Write the files."""
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
