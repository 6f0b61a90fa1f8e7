"""Alerts and dashboards: what is committed is current, the tools take it, every query finds a real daemon's data."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import kvservice_client as kv
from kvservice_client.device import CachePart, DeviceCache, DeviceKV
from scripts import generate_metrics_doc, generate_monitoring
from scripts.dashboard import GPU_ROW
from tests.blocks import chain
from tests.daemons import DaemonProcess, DaemonThread
from tests.devices import FakeGpu
from tests.operations.prometheus import Prometheus
from tests.operations.traffic import BLOCK_BYTES, BLOCKS, MODEL, Engine, endless
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


def expressions(row: str = "") -> dict[str, str]:
    """Every query of the dashboard, or of one row, by panel and legend."""
    found: dict[str, str] = {}
    of = ""
    for panel in json.loads(generate_monitoring.DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        of = panel["title"] if panel["type"] == "row" else of
        if not row or row == of:
            found |= {f"{panel['title']}: {each['legendFormat']}": each["expr"] for each in panel.get("targets", ())}
    return found


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
        without_gpu = expressions().keys() - expressions(GPU_ROW).keys()
        for where in without_gpu:

            def has_data(expression: str = filled_in(expressions()[where])) -> bool:
                return any(not math.isnan(float(sample["value"][1])) for sample in prometheus.query(expression))

            eventually(has_data, within_s=30, what=f"data for {where}")
        for alert in prometheus.rules():
            assert alert["health"] == "ok", alert
        assert not [alert["name"] for alert in prometheus.rules() if alert["name"] in NEVER_BY_LOAD and alert["alerts"]]
        assert prometheus.query('up{job="gpu/kvservice"}')[0]["value"][1] == "1"


def test_every_query_about_gpus_returns_what_a_gpu_of_host_memory_moved(
    stack: ExitStack, gpu: FakeGpu, require_tool: RequireTool, tmp_path: Path
) -> None:
    """The copies are the daemon's own; only the copy engines are a thread's. Failures are none, and said to be 0."""
    program = require_tool("prometheus", "prometheus")
    folder = Path(tempfile.mkdtemp(prefix="kvs-"))
    stack.callback(shutil.rmtree, folder)
    daemon = stack.enter_context(DaemonThread(folder / "daemon", driver=gpu.driver, http_port=0))
    client = stack.enter_context(kv.attach(MODEL, socket_dir=daemon.socket_dir))
    cache = DeviceCache(BLOCKS, (CachePart(gpu.allocate(BLOCKS * BLOCK_BYTES), BLOCK_BYTES, BLOCK_BYTES),))
    device = DeviceKV(client, cache, driver=gpu.driver)
    stack.callback(device.close)
    server = Prometheus(program, tmp_path, target=daemon.daemon.http_address, rules=generate_monitoring.ALERTS)
    prometheus = stack.enter_context(server)
    numbers = count()
    queries = expressions(GPU_ROW)
    assert len(queries) == 4
    for where, expression in queries.items():

        def has_moved(where: str = where, expression: str = filled_in(expression)) -> bool:
            hashes = chain(f"chat {next(numbers)}", BLOCKS)
            assert device.save(hashes, range(BLOCKS)).saved == BLOCKS
            assert device.load(hashes, range(BLOCKS)).result().blocks == BLOCKS
            values = {each["metric"]["direction"]: float(each["value"][1]) for each in prometheus.query(expression)}
            if where.startswith("Copies that failed"):
                return values == {"dram_to_gpu": 0, "gpu_to_dram": 0}
            return len(values) == 2 and min(values.values()) > 0

        eventually(has_moved, within_s=60, what=f"data for {where}")


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
