"""prometheus: a real server that scrapes a real daemon every second, and answers queries."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.waiting import eventually

TIMEOUT_S = 30
LABELS = {"namespace": "gpu", "node": "node-1"}
"""What a PodMonitor would add to the daemon's series."""


class Prometheus:
    """`program` with its data in `directory`. A context manager that leaves no process behind."""

    def __init__(self, program: str, directory: Path, *, target: str, rules: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self._address = f"127.0.0.1:{unused.getsockname()[1]}"
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {"job_name": "gpu/kvservice", "static_configs": [{"targets": [target], "labels": LABELS}]}
            ],
        }
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        self._log = (directory / "prometheus.log").open("w+", encoding="utf-8")
        self._popen = subprocess.Popen(
            [
                program,
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self._address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        try:
            eventually(lambda: self._get("/api/v1/status/buildinfo"), within_s=TIMEOUT_S, what="Prometheus answers")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._popen.kill()
        self._popen.wait(TIMEOUT_S)
        self._log.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression. AssertionError: Prometheus refused it."""
        answer = self._get(f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def query_range(self, expression: str, *, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        """The series of an expression between two times, each with `values`: (time, text) pairs."""
        asked = {"query": expression, "start": start_s, "end": end_s, "step": step_s}
        result: list[dict[str, Any]] = self._get(f"/api/v1/query_range?{urllib.parse.urlencode(asked)}")["data"][
            "result"
        ]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """The alerting rules that it loaded, with their health and state."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://{self._address}{path}", timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{urllib.parse.unquote_plus(path)}: {error.read().decode()}") from error
        except OSError as error:
            raise AssertionError(f"Prometheus does not answer: {error}") from error
