"""policies: in which order blocks leave when space is needed, and what of it the waiting queue decides.

`protocol` is what the store asks of a policy, `window` what requests that wait will need; `order` is how rows are kept
in order cheaply; the rest is one policy each. See DESIGN.md.
"""

from collections.abc import Callable, Mapping

from kvservice.errors import ConfigError
from kvservice.policies.fifo import FirstInFirstOut
from kvservice.policies.lookahead import LookAhead
from kvservice.policies.lru import LeastRecentlyUsed
from kvservice.policies.predictive import Predictive
from kvservice.policies.protocol import NO_MEMORY, EvictionPolicy, Memories, Memory, nothing_remembered
from kvservice.policies.window import Window

__all__ = [
    "NO_MEMORY",
    "POLICIES",
    "EvictionPolicy",
    "FirstInFirstOut",
    "LeastRecentlyUsed",
    "LookAhead",
    "Memories",
    "Memory",
    "Predictive",
    "Window",
    "make_policy",
    "nothing_remembered",
]

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "fifo": FirstInFirstOut,
    "lru": LeastRecentlyUsed,
    "lookahead": lambda: LookAhead(LeastRecentlyUsed(), name="lookahead"),
    "predictive": lambda: LookAhead(Predictive(), name="predictive"),
}


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy of that name.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    try:
        return POLICIES[name]()
    except KeyError:
        raise ConfigError(f"unknown policy {name!r}; choose one of: {', '.join(sorted(POLICIES))}") from None
