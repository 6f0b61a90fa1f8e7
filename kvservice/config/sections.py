"""sections: the headings that knobs stand under, in the documentation and in printed files."""

from __future__ import annotations

SOCKETS = "Sockets and access"
DRAM = "DRAM tier"
NVME = "NVMe tier"
EVICTION = "Eviction"
LEASES = "Leases and reservations"
LIMITS = "Limits on what clients may ask for"
LIFECYCLE = "Background work, draining, logs"
NETWORK = "TCP and HTTP"
SAVINGS = "Estimates of what was saved"
