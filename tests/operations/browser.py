"""browser: headless Chromium, one page at a time, as a picture or as the document that it made of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.processes import run_alone

TIMEOUT_S = 60


class Browser:
    """Runs `program` with a profile of its own, under `directory`, for each page."""

    def __init__(self, program: str, directory: Path) -> None:
        self._program = program
        self._directory = directory

    def picture(self, url: str, name: str, *, width: int, height: int, is_dark: bool = False) -> bytes:
        """The page as PNG; `name` is the file's, for whoever wants to look at it."""
        path = self._directory / f"{name}.png"
        scheme = ["--blink-settings=preferredColorScheme=0"] if is_dark else ["--blink-settings=preferredColorScheme=1"]
        self._run(url, f"--screenshot={path}", f"--window-size={width},{height}", "--hide-scrollbars", *scheme)
        return path.read_bytes()

    def document(self, url: str, *, width: int = 1000) -> str:
        """The page's DOM, as Chromium parsed it."""
        return self._run(url, "--dump-dom", f"--window-size={width},800")

    def _run(self, url: str, *arguments: str) -> str:
        profile = tempfile.mkdtemp(dir=self._directory)
        command = [
            self._program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            *arguments,
            url,
        ]
        ended = run_alone(command, timeout_s=TIMEOUT_S)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
