"""docs/metrics.md says what a daemon shows."""

from __future__ import annotations

import re

import pytest

from scripts import generate_metrics_doc

pytestmark = pytest.mark.unit

UNITS = ("_seconds", "_bytes", "_blocks", "_tokens", "_ratio", "_info")


def test_the_committed_page_is_current() -> None:
    committed = generate_metrics_doc.PAGE.read_text(encoding="utf-8")
    assert committed == generate_metrics_doc.page(), "run scripts/generate_metrics_doc.py"


def test_every_series_has_a_prefix_a_meaning_and_few_labels() -> None:
    for family in generate_metrics_doc.families():
        assert re.fullmatch(r"kvservice_[a-z]+(_[a-z0-9]+)*", family.name), family.name
        assert family.documentation.endswith("."), f"{family.name}: {family.documentation}"
        if family.type == "histogram":
            assert family.name.endswith(UNITS), f"{family.name}: a histogram has a unit"
        labels = {tuple(sorted(sample.labels)) for sample in family.samples}
        assert all(len(set(of) - {"le"}) <= 3 for of in labels), family.name
        assert len(family.samples) <= 400, f"{family.name} has {len(family.samples)} samples before any traffic"
