"""Where LMCache does not run, its reference is skipped with the reason, and no process of it is left."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks import lmcache_reference
from benchmarks.measuring import Skipped

pytestmark = pytest.mark.integration


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder named by LMCACHE_SITE, empty."""
    monkeypatch.setenv("LMCACHE_SITE", str(tmp_path))
    monkeypatch.delenv("LMCACHE_SYMBOL", raising=False)
    return tmp_path


def write_main(site: Path, source: str) -> None:
    (site / "lmcache" / "cli").mkdir(parents=True)
    (site / "lmcache" / "cli" / "main.py").write_text(f"import sys\ndef main():\n    {source}\n", encoding="utf-8")


def test_not_installed(site: Path) -> None:
    with pytest.raises(Skipped, match="not installed"):
        next(lmcache_reference.measure(site / "logs"))


@pytest.mark.timeout(60)
def test_a_server_that_ends_gives_its_last_words(site: Path) -> None:
    write_main(site, "sys.exit('no such GPU')")
    with pytest.raises(Skipped, match=r"ended with 1: .*no such GPU"):
        next(lmcache_reference.measure(site / "logs"))


@pytest.mark.timeout(60)
def test_a_server_that_does_not_come_up_is_ended(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_reference, "DEADLINE_S", 0.5)
    write_main(site, "import signal; signal.pause()")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(Skipped, match="not up"):
        next(lmcache_reference.measure(site / "logs"))
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_an_earlier_run_is_named_as_such(site: Path) -> None:
    lmcache_reference.peer.cache_clear()
    assert "earlier run" in lmcache_reference.peer().source
    lmcache_reference.peer.cache_clear()
