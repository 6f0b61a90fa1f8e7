"""status: the page for whoever has no Grafana, and the last hour that it shows."""

from kvservice.status.board import (
    HOUR_S,
    Board,
    HitCounts,
    InstanceLine,
    MissLine,
    NamespaceLine,
    Sample,
    Status,
    TierLine,
)
from kvservice.status.page import render

__all__ = [
    "HOUR_S",
    "Board",
    "HitCounts",
    "InstanceLine",
    "MissLine",
    "NamespaceLine",
    "Sample",
    "Status",
    "TierLine",
    "render",
]
