"""choices: the words among which a knob's value is chosen."""

POLICIES = ("fifo", "lru", "lookahead", "predictive")
"""Names of the eviction policies; the room `policies` implements each."""

ADMISSIONS = ("all", "reused")
"""Which committed blocks are written to NVMe; `store.write_behind` says what they mean."""

LOG_LEVELS = ("debug", "info", "warning", "error")
