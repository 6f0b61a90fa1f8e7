"""lookahead: what the waiting queue means for the tiers: windows, what to fetch now, load or recompute.

Covers: the paper's window lengths, a planner of fetches with a time model, the choice between
loading and recomputing, and the rates that both are based on. Does not cover: the queue itself
(`queues`), what leaves (`policies`), moving bytes (`transfers`). Pure: events in, instructions
out, time is an argument; the daemon and the simulator use the same code.
"""

from kvservice.lookahead.planner import Fetch, Job, Plan, Planner
from kvservice.lookahead.rates import Throughput
from kvservice.lookahead.recompute import LoadPlan, Speeds, load_or_recompute
from kvservice.lookahead.windows import Windows, window_lengths

__all__ = [
    "Fetch",
    "Job",
    "LoadPlan",
    "Plan",
    "Planner",
    "Speeds",
    "Throughput",
    "Windows",
    "load_or_recompute",
    "window_lengths",
]
