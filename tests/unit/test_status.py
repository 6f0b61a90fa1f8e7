"""The status page: the last hour in a bounded ring, every figure where it belongs, nothing that a name could inject."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.metrics import CANCELLED, MISS_REASONS
from kvservice.status import Board, HitCounts, InstanceLine, MissLine, NamespaceLine, Sample, Status, TierLine, render
from kvservice.status.board import SAMPLES_MAX
from kvservice.status.page import MISS_MEANINGS, STALE_S

pytestmark = pytest.mark.unit

VOID = {"meta", "rect", "line", "link", "br"}


class Document(HTMLParser):
    """The text of a page by tag, and whether every tag is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += " " + data


def counts(dram: int = 0, nvme: int = 0, misses: Mapping[str, int] | None = None) -> HitCounts:
    return HitCounts(dram, nvme, misses or {})


def status(at_s: float = 0.0, of: HitCounts | None = None) -> Status:
    return Status(
        at_s=at_s,
        state="serving",
        version="1.2.3",
        uptime_s=7200,
        tiers=[
            TierLine("dram", "online", 4 << 30, 1 << 30),
            TierLine("nvme", "offline: the device is gone", 100 << 30, 64 << 30),
        ],
        instances=[InstanceLine(7, "vllm-0", 300, 2, 1)],
        instances_attached=3,
        namespaces=[NamespaceLine("llama bf16", 1234, 1 << 30, 1000, 750)],
        namespaces_known=1,
        counts=of or counts(),
        misses=[MissLine(at_s - 5, 7, "llama bf16", 4, 16, "not_held")],
    )


def test_a_minute_holds_what_came_in_it_and_the_current_one_grows() -> None:
    board = Board(clock=lambda: 0.0)
    for at_s, dram, missed in ((0, 0, 0), (30, 10, 2), (61, 15, 2), (90, 20, 9)):
        board.publish(status(at_s, counts(dram, misses={"not_held": missed})))
    assert board.latest is not None
    _, minutes = board.latest
    assert [(minute.counts.dram, minute.counts.missed) for minute in minutes] == [(15, 2), (5, 7)]
    assert sum(minute.counts.requested for minute in minutes) == 29


@given(st.lists(st.floats(0.1, 2000), min_size=1, max_size=300))
def test_the_ring_is_bounded_and_covers_the_last_hour(pauses_s: list[float]) -> None:
    board, at_s = Board(clock=lambda: 0.0), 0.0
    published: list[tuple[float, int]] = []
    for dram, pause_s in enumerate(pauses_s):
        published.append((at_s, dram))
        board.publish(status(at_s, counts(dram)))
        at_s += pause_s
    assert board.latest is not None
    latest, minutes = board.latest
    assert len(minutes) <= SAMPLES_MAX + 1
    assert all(latest.at_s - minute.at_s <= 3600 for minute in minutes)
    shown = sum(minute.counts.dram for minute in minutes)
    first_at_s = minutes[0].at_s
    assert shown == published[-1][1] - next(dram for at, dram in published if at == first_at_s)


def test_what_is_published_does_not_change_under_its_reader() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish(status(0, counts(1)))
    before = board.latest
    board.publish(status(1, counts(5)))
    assert before is not None
    assert before[0].counts.dram == 1


def test_every_figure_is_on_the_page() -> None:
    hour = [Sample(0, counts(600, 150, {"not_held": 240, "tier_offline": 10}))]
    page = Document(render((status(10, hour[0].counts), hour), 10))
    for words in (
        "serving", "1.2.3, up 2 h", "75.0 %", "of 1,000 blocks", "DRAM in use", "25.0 %", "1.0 GiB of 4.0 GiB",
        "offline: the device is gone", "vllm-0", "and 2 more", "llama bf16", "1,234", "4 of 16", "5 s ago",
        "not_held", MISS_MEANINGS["tier_offline"],
    ):  # fmt: skip
        assert words in page.words, words
    assert {"svg", "meter", "table"} <= page.tags


def test_the_page_is_self_contained() -> None:
    page = Document(render((status(), []), 0))
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    targets = [value for name, value in page.attributes if name in {"href", "src", "action"}]
    assert targets
    assert all(re.fullmatch(r"[a-z]+", target) for target in targets)
    assert "url(" not in render((status(), []), 0)
    assert "@import" not in render((status(), []), 0)


def test_names_that_engines_chose_are_text_and_nothing_else() -> None:
    evil = "</td><script>alert(1)</script>\x1b[31m\u202e\"'"
    hostile = replace(
        status(),
        state="background task died: Error('<script>')",
        instances=[InstanceLine(1, evil, 1, 0, 0)],
        namespaces=[NamespaceLine(evil, 1, 1, 1, 1)],
        misses=[MissLine(0, 1, evil, 1, 1, "corrupt")],
    )
    text = render((hostile, []), 0)
    assert "script" not in Document(text).tags
    assert "\x1b" not in Document(text).words
    assert "\u202e" not in text


def test_a_stuck_event_loop_says_so_although_it_publishes_nothing() -> None:
    assert "stuck" in render((status(0), []), STALE_S + 1)
    assert "stuck" not in render((status(0), []), STALE_S - 1)


def test_a_daemon_that_has_seen_nothing_has_a_page() -> None:
    assert "starting" in render(None, 0)
    empty = replace(
        status(), instances=[], instances_attached=0, namespaces=[], namespaces_known=0, misses=[], tiers=[]
    )
    words = Document(render((empty, []), 0)).words
    assert "No engine is attached." in words
    assert "No block was missed." in words


def test_every_reason_of_a_miss_has_a_meaning() -> None:
    assert set(MISS_MEANINGS) == {*MISS_REASONS, CANCELLED}
