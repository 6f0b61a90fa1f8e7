"""simulate: the daemon's index, policies and planner under a simulated clock, devices and engine.

Read in this order: `options` and `run` (arguments become runs), `requests` and `workload` (what is replayed), `tiers`
(the daemon's namespace without memory), `replay` (block by block, no time), `engine` with `movement` and `device`
(time-aware), `oracle` (Belady's bound), `outcome`, `report` and `plots` (what is measured, printed and drawn).
"""

from kvservice.simulate.options import add_arguments, read_options
from kvservice.simulate.run import run

__all__ = ["add_arguments", "read_options", "run"]
