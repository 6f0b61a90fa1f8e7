"""Alerts and dashboards: what is committed is current, the tools take it, every query finds a real daemon's data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts import generate_metrics_doc, generate_monitoring
from tests.daemons import DaemonProcess
from tests.operations.prometheus import Prometheus
from tests.operations.traffic import Engine, endless
from tests.waiting import eventually

pytestmark = [pytest.mark.operations, pytest.mark.timeout(240)]

RequireTool = Callable[[str, str], str]
ROOT = Path(__file__).resolve().parent.parent.parent
RUNBOOKS = ROOT / "docs" / "OPERATIONS.md"
VARIABLES = {"$namespace": "gpu", "$node": "node-1", "$instance": ".*", "$__rate_interval": "5s", "$__range": "30s"}
NEVER_BY_LOAD = {"KVServiceTierOffline", "KVServiceChecksumFailures", "KVServiceInternalErrors", "KVServiceDown"}
"""Alerts that no load may cause."""
SUFFIX = re.compile(r"_(bucket|count|sum)$")


def panels() -> list[dict[str, Any]]:
    document = json.loads(generate_monitoring.DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every query of the dashboard, by panel and legend."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }


def alerts() -> list[dict[str, Any]]:
    return [rule for group in generate_monitoring.alert_groups() for rule in group["rules"]]


def filled_in(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def series_of(expression: str) -> set[str]:
    return {SUFFIX.sub("", name) for name in re.findall(r"\bkvservice_[a-z_]+", expression)}


@contextmanager
def load(daemon: DaemonProcess) -> Iterator[None]:
    """An engine that works until the block ends."""
    stop = threading.Event()
    with Engine(daemon.socket_dir) as engine:
        worker = threading.Thread(target=endless, args=(engine, stop), name="traffic")
        worker.start()
        try:
            yield
        finally:
            stop.set()
            worker.join(30)


def test_what_is_generated_is_current() -> None:
    for path, text in generate_monitoring.files().items():
        assert path.read_text(encoding="utf-8") == text, "run .venv/bin/python -m scripts.generate_monitoring"


def test_promtool_takes_the_rules_and_every_alert_fires_when_it_should(require_tool: RequireTool) -> None:
    promtool = require_tool("promtool", "prometheus")
    folder = generate_monitoring.FOLDER
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        ended = subprocess.run([promtool, *command], cwd=folder, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    tests = (generate_monitoring.FOLDER / "alerts_test.yaml").read_text(encoding="utf-8")
    cases = re.findall(r"alertname: (\w+)\n +exp_alerts:( \[\])?", tests)
    for alert in alerts():
        outcomes = {bool(quiet) for name, quiet in cases if name == alert["alert"]}
        assert outcomes == {True, False}, alert["alert"]


def test_every_alert_has_a_runbook() -> None:
    headings = set(re.findall(r"^### (\w+)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {alert["alert"] for alert in alerts()} == {name for name in headings if name.startswith("KVService")}


def test_alerts_and_dashboard_use_series_that_exist() -> None:
    known = {SUFFIX.sub("", generate_metrics_doc.exposed_name(family)) for family in generate_metrics_doc.families()}
    for where, expression in [*expressions().items(), *((alert["alert"], alert["expr"]) for alert in alerts())]:
        used = series_of(expression)
        assert used or where == "KVServiceDown", where
        assert used <= known, f"{where}: {used - known}"


def test_every_query_of_the_dashboard_returns_data_of_a_daemon_under_load(
    daemon: DaemonProcess, require_tool: RequireTool, tmp_path: Path
) -> None:
    program = require_tool("prometheus", "prometheus")
    server = Prometheus(program, tmp_path, target=daemon.http_address, rules=generate_monitoring.ALERTS)
    with server as prometheus, load(daemon):
        for where, expression in expressions().items():

            def has_data(expression: str = filled_in(expression)) -> bool:
                return any(not math.isnan(float(sample["value"][1])) for sample in prometheus.query(expression))

            eventually(has_data, within_s=30, what=f"data for {where}")
        for alert in prometheus.rules():
            assert alert["health"] == "ok", alert
        assert not [alert["name"] for alert in prometheus.rules() if alert["name"] in NEVER_BY_LOAD and alert["alerts"]]
        assert prometheus.query('up{job="gpu/kvservice"}')[0]["value"][1] == "1"


def test_the_dashboard_can_be_imported_and_narrowed() -> None:
    document = json.loads(generate_monitoring.DASHBOARD.read_text(encoding="utf-8"))
    assert [variable["name"] for variable in document["templating"]["list"]] == [
        "datasource", "namespace", "node", "instance",
    ]  # fmt: skip
    numbers = [panel["id"] for panel in document["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            for name in ("$namespace", "$node", "$instance"):
                assert name in target["expr"], panel["title"]
