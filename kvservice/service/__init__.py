"""service: the contract's messages <-> the store's nouns, and the one table of errors.

`control` serves engines over the Unix socket, `observer` serves Stats and Explain over TCP,
`calls` is what every RPC goes through (who, how long, which error), `messages` translates.
"""

from kvservice.service.control import ControlService
from kvservice.service.observer import ObserverService

__all__ = ["ControlService", "ObserverService"]
