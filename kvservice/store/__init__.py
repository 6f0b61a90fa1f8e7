"""store: the one owner of state. See DESIGN.md beside this file.

`store` has the calls, `namespace` keeps one namespace's books in step, `registry` says which namespaces exist
and who attached them, `space` and `disk_space` make room, `expiry` drops what is due, `checksummer` and
`write_behind` work behind the calls, `device_copies` copies to and from GPUs, `explain` answers why, `outcomes`
are the answers.
"""

from kvservice.device import LANES, DevicePlane, Region
from kvservice.store.device_copies import DevicePlaces
from kvservice.store.explain import explain
from kvservice.store.namespace import Counters, Namespace, Peer
from kvservice.store.store import Store

__all__ = [
    "LANES",
    "Counters",
    "DevicePlaces",
    "DevicePlane",
    "Namespace",
    "Peer",
    "Region",
    "Store",
    "explain",
]
