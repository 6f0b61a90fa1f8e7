"""Take the pictures in docs/: the status page and the dashboard's data of a daemon under load, in headless Chromium.

    .venv/bin/python -m scripts.take_pictures [SECONDS]

Needs prometheus and chromium. The dashboard is drawn from Prometheus' answers to the dashboard's own queries, panel by
panel, by a few lines of SVG: Grafana would draw the same figures differently.
"""

from __future__ import annotations

import html
import math
import shutil
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scripts.dashboard.rows import ROWS, Panel
from scripts.generate_monitoring import ALERTS
from tests.daemons import DaemonProcess
from tests.operations.browser import Browser
from tests.operations.prometheus import Prometheus
from tests.operations.traffic import KNOBS, Engine, endless

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = ("#1f6feb", "#8250df", "#d4a72c", "#1a7f37", "#cf222e", "#0a7ea4", "#bf5b16", "#59636e")
WIDTH, HEIGHT = 360, 120
STYLE = """body{margin:0;font:13px/1.4 system-ui,sans-serif;color:#1b1f24;background:#fff;padding:16px;width:1200px}
h1{font-size:19px;margin:0 0 4px}h2{font-size:15px;margin:14px 0 6px}.row{display:grid;
grid-template-columns:repeat(3,1fr);gap:10px}.panel{border:1px solid #d8dde3;border-radius:6px;padding:8px;
background:#f5f6f8}.panel b{font-weight:600}.figure{font-size:24px;font-weight:650}svg{width:100%;height:110px;
display:block}.legend span{margin-right:10px;font-size:11px;color:#59636e}p{color:#59636e;margin:0}"""


def main() -> None:
    """Work for a while, then take both pictures."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 90.0
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kvs-"))
        stack.callback(shutil.rmtree, folder)
        knobs = KNOBS | {"nvme_dirs": folder / "nvme"}
        daemon = stack.enter_context(DaemonProcess(folder / "daemon", **knobs))
        started_s = time.time()
        prometheus = stack.enter_context(
            Prometheus(_program("prometheus"), folder, target=daemon.http_address, rules=ALERTS)
        )
        stop = threading.Event()
        for name in ("vllm-0", "vllm-1"):
            engine = stack.enter_context(Engine(daemon.socket_dir, name=name))
            worker = threading.Thread(target=endless, args=(engine, stop), kwargs={"name": name})
            worker.start()
            stack.callback(worker.join)
        stack.callback(stop.set)
        time.sleep(seconds)
        browser = Browser(_program("chromium"), folder)
        status = browser.picture(f"http://{daemon.http_address}/", "status", width=1000, height=1180)
        page = folder / "dashboard.html"
        page.write_text(_dashboard(prometheus, started_s + 10, time.time()), encoding="utf-8")
        board = browser.picture(page.as_uri(), "dashboard", width=1240, height=3160)
    (DOCS / "status-page.png").write_bytes(status)
    (DOCS / "dashboard.png").write_bytes(board)
    print(f"wrote {DOCS / 'status-page.png'} and {DOCS / 'dashboard.png'}")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed")
    return found


def _dashboard(prometheus: Prometheus, start_s: float, end_s: float) -> str:
    rows = "".join(
        f"<h2>{title}</h2><div class=row>{''.join(_panel(panel, prometheus, start_s, end_s) for panel in panels)}</div>"
        for title, panels in ROWS.items()
    )
    about = f"The dashboard's queries over {end_s - start_s:.0f} s of a test's load, as Prometheus answered them."
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><h1>kvservice</h1><p>{about}</p>{rows}"


def _panel(panel: Panel, prometheus: Prometheus, start_s: float, end_s: float) -> str:
    lines: list[tuple[str, list[float]]] = []
    for legend, query in panel.queries.items():
        asked = query.replace("{*,", "{").replace("{*}", "")
        asked = asked.replace("$__rate_interval", "10s").replace("$__range", f"{end_s - start_s:.0f}s")
        lines += [
            (_legend(legend, found["metric"]), [float(text) for _, text in found["values"]])
            for found in prometheus.query_range(asked, start_s=start_s, end_s=end_s, step_s=2)
        ]
    title = f"<b>{html.escape(panel.title)}</b> <span>{panel.unit}</span>"
    if panel.kind == "stat":
        value = lines[0][1][-1] if lines else math.nan
        return f"<div class=panel>{title}<div class=figure>{_figure(value, panel.unit)}</div></div>"
    return f"<div class=panel>{title}{_chart(lines, panel.unit)}</div>"


def _legend(template: str, labels: dict[str, Any]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value or "-")
    return template


def _chart(lines: list[tuple[str, list[float]]], unit: str) -> str:
    finite = [value for _, values in lines for value in values if math.isfinite(value)]
    top = max(finite, default=0.0) or 1.0
    drawn = "".join(
        f'<polyline fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.6" points="'
        + " ".join(
            f"{WIDTH * at / max(len(values) - 1, 1):.1f},{HEIGHT - 4 - (HEIGHT - 16) * value / top:.1f}"
            for at, value in enumerate(values)
            if math.isfinite(value)
        )
        + '"/>'
        for number, (_, values) in enumerate(lines)
    )
    legend = "".join(
        f'<span><i style="color:{COLOURS[number % len(COLOURS)]}">&#9632;</i> {html.escape(name)}</span>'
        for number, (name, _) in enumerate(lines)
    )
    scale = f'<text x="2" y="10" font-size="10" fill="#59636e">{_figure(top, unit)}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{scale}{drawn}</svg>'
        f"<div class=legend>{legend}</div>"
    )


def _figure(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.3g}"


if __name__ == "__main__":
    main()
