"""server: lifecycle, health, drain.

`daemon` starts and stops everything in order, `sockets` owns the socket directory, `tasks` watches
the background work, `listeners` makes the gRPC servers.
"""

from kvservice.server.daemon import Daemon, run

__all__ = ["Daemon", "run"]
