"""errors: what can go wrong, and what the caller should do about it.

    KVServiceError
    |-- InvalidRequest        fix the call; the message names the field and the bound
    |-- NamespaceUnknown      attach again
    |-- LayoutMismatch        stop: the engine is incompatible with what is stored
    |-- LeaseUnknown          start again at lookup
    |-- LeaseExpired          start again at lookup
    |-- ReservationLost       save again, or skip
    |-- CapacityExhausted     skip the save
    |   `-- QuotaExceeded     skip the save
    |-- Overloaded            back off, treat as a miss
    |   `-- Draining          back off, treat as a miss
    |-- Unauthenticated       fix credentials
    `-- PermissionDenied      fix credentials
    StartupError              the daemon cannot start; the message says what to change
    `-- ConfigError           a knob is wrong

These classes know no gRPC: `service` holds the one table that maps them. A block that is
corrupt or whose tier is offline is an outcome, not an error: calls are batched.
"""

from __future__ import annotations


class KVServiceError(Exception):
    """Base of everything the daemon tells a caller about a failed call."""


class InvalidRequest(KVServiceError):
    """The call itself is wrong.

    Args:
        message: what is wrong and which bound it breaks.
        field: the request field at fault.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NamespaceUnknown(KVServiceError):
    """The namespace id does not belong to this attachment (the daemon restarted, say)."""


class LayoutMismatch(KVServiceError):
    """A namespace with this fingerprint exists with other sizes."""


class LeaseUnknown(KVServiceError):
    """No such lease or reservation for this instance (never granted, or released before)."""


class LeaseExpired(KVServiceError):
    """The lease passed its expiry and cannot be renewed."""


class ReservationLost(KVServiceError):
    """The reservation expired or was dropped before it was committed."""


class CapacityExhausted(KVServiceError):
    """No space can be made: everything that could leave is in use."""


class QuotaExceeded(CapacityExhausted):
    """The namespace's quota is full of blocks in use."""


class Overloaded(KVServiceError):
    """A bound on concurrent work is reached.

    Args:
        message: which bound.
        retry_after_s: when another try makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Overloaded):
    """The daemon is shutting down and takes no new work."""


class Unauthenticated(KVServiceError):
    """The call carries no token, or one that was not issued or has ended."""


class PermissionDenied(KVServiceError):
    """The peer is known and may not do this."""


class StartupError(Exception):
    """The daemon cannot start. The message says what to change."""


class ConfigError(StartupError):
    """A knob is unknown, malformed or out of bounds."""
