"""knobs: every knob once, with unit, default, bounds and consequence; one frozen object."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from kvservice.config import checks, document, sources
from kvservice.config.choices import ADMISSIONS, LOG_LEVELS, POLICIES
from kvservice.config.fields import knob, knobs_of, table_knob
from kvservice.config.sections import DRAM, EVICTION, LEASES, LIFECYCLE, LIMITS, NETWORK, NVME, SAVINGS, SOCKETS
from kvservice.config.values import GIB, KIB, MIB, RULE_SETTINGS, NamespaceRule

_UID_MAX = 2**32 - 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """The daemon's configuration, checked, never changed after it was made.

    Sizes are bytes, durations seconds. Build it with `load`, or directly in tests; both raise ConfigError, which names
    the knob, the bound and what to write instead. `origins` says where each value that is not a default came from.
    """

    socket_dir: str = knob(
        "/run/kvservice",
        SOCKETS,
        "Directory of control.sock (gRPC) and memory.sock (memory descriptors, calls), made with mode 0700 (0750 with "
        "socket_group). Without a value it is $XDG_RUNTIME_DIR/kvservice where that variable is set. Clients look "
        "in the same place; one daemon per directory.",
    )
    socket_group: str = knob(
        "",
        SOCKETS,
        "Group, by name or number, whose members may enter socket_dir (mode 0750). Empty: only the daemon's own user "
        "(mode 0700). Entering is not enough: the peer's uid or gid must be allowed below as well.",
    )
    allowed_uids: tuple[int, ...] = knob(
        (),
        SOCKETS,
        "User ids that may attach, as the kernel reports them for the peer. Empty: the daemon's own uid.",
        at_most=_UID_MAX,
    )
    allowed_gids: tuple[int, ...] = knob(
        (),
        SOCKETS,
        "Primary group ids that may attach, whatever their uid; in addition to allowed_uids.",
        at_most=_UID_MAX,
    )
    tenants: Mapping[str, str] = table_knob(
        SOCKETS,
        'Tenant of each identity: "uid:1000" for a local user, "cn:ops" for the common name of a TLS client. Tenants '
        "never see each other's blocks. An identity that is not listed is a tenant of its own.",
    )

    dram_bytes: int = knob(
        4 * GIB,
        DRAM,
        "Memory that all namespaces together may take for blocks. It is pre-faulted as it is granted and not given "
        "back to the system while a namespace needs it: leave room for the engines, or the kernel kills somebody.",
        at_least=4 * KIB,
    )
    dram_segment_bytes: int = knob(
        256 * MIB,
        DRAM,
        "Memory moves between namespaces in pieces of this size. Larger: fewer descriptors and mappings. Smaller: less "
        "is stranded in a namespace that is little used. Left at its default it is lowered to an eighth of dram_bytes "
        "where that is smaller.",
        at_least=4 * KIB,
    )
    dram_grow_ahead_bytes: int = knob(
        1 * GIB,
        DRAM,
        "Free memory kept ready, pre-faulted and mapped by the clients, per namespace that is being written to. Too "
        "small and a burst of saves waits for page faults; too large and idle namespaces hold memory that others need.",
    )
    dram_quota_bytes: int = knob(
        0,
        DRAM,
        "Memory that one namespace may fill, unless [namespaces] says otherwise for its label; 0 is no quota. At its "
        "quota a namespace evicts its own blocks.",
    )
    dram_numa_node: int = knob(
        -1,
        DRAM,
        "NUMA node that the memory should come from, best the GPU's; -1 leaves the choice to the kernel.",
        at_least=-1,
        at_most=1023,
    )
    dram_huge_pages: bool = knob(
        default=True,
        section=DRAM,
        about="Ask for huge pages. Fewer page-table entries make mapping and copying faster where the system grants "
        "them; where it does not, nothing fails.",
    )
    namespaces: Mapping[str, NamespaceRule] = table_knob(
        DRAM,
        "Quotas, time to live and policy for the namespaces whose label matches a glob; the first match in the file's "
        "order counts. What a rule leaves out comes from the knob of the same name.",
    )

    nvme_dirs: str = knob(
        "",
        NVME,
        "Directories of the NVMe tier, one per device, separated by colons; empty turns the tier off. One daemon per "
        "directory. What is in them survives restarts; removing a directory loses only cached blocks.",
    )
    nvme_bytes: int = knob(
        0,
        NVME,
        "Bytes that each directory may take, data, log and checkpoints together; 0 is half of what is free when the "
        "directory is first used. The last 10 % of the file system are never taken.",
    )
    nvme_segment_bytes: int = knob(
        256 * MIB,
        NVME,
        "Space on disk moves between namespaces in files of this size, allocated when first needed.",
        at_least=1 * MIB,
    )
    nvme_quota_bytes: int = knob(
        0,
        NVME,
        "Bytes on NVMe, all directories together, that one namespace may fill, unless [namespaces] says otherwise for "
        "its label; 0 is no quota. At its quota a namespace's coldest blocks leave NVMe.",
    )
    nvme_write_behind_s: float = knob(
        2.0,
        NVME,
        "Committed blocks are durable within about this time. Shorter: less is lost with the power. Longer: larger "
        "batches, fewer flushes.",
        at_least=0.01,
    )
    nvme_admission: str = knob(
        "all",
        NVME,
        "Which committed blocks are written. all: every one. reused: only when a request uses it again while it is in "
        "DRAM; far fewer writes (docs/policies.md), but what nobody used again is lost at a restart.",
        choices=ADMISSIONS,
    )
    nvme_queue_depth: int = knob(
        4,
        NVME,
        "Reads and writes under way at once per directory, each in a thread. More helps until the device is busy.",
        at_least=1,
        at_most=64,
    )
    nvme_waiting_max: int = knob(
        4096,
        NVME,
        "Transfers that may wait per directory; above, blocks are misses instead of arriving late.",
        at_least=1,
    )
    nvme_bytes_per_s_max: int = knob(
        0,
        NVME,
        "Bytes per second that each directory may move, reads and writes together; 0 is no bound. For devices that "
        "others need too. Lower: engines recompute more of what is on NVMe.",
    )

    device_plane: str = knob(
        "auto",
        DRAM,
        "Copies straight to and from engines' GPU memory, by CUDA IPC. auto: offered where this process sees a GPU; "
        "its first use takes about 0.5 GiB of the GPU. off: engines copy through shared memory.",
        choices=("auto", "off"),
    )

    high_watermark: float = knob(
        0.95,
        EVICTION,
        "Fraction of a namespace's memory in use at which eviction in the background starts, once it cannot grow. "
        "Lower: more space is ready for the next save, and fewer blocks stay.",
        at_most=1,
    )
    low_watermark: float = knob(
        0.90,
        EVICTION,
        "Fraction in use at which that eviction stops; below high_watermark. A wide gap: larger, rarer batches.",
        at_most=1,
    )
    ttl_s: float = knob(
        0.0,
        EVICTION,
        "Blocks that were not used for so long leave DRAM and NVMe, unless [namespaces] says otherwise for their "
        "label; 0 keeps them until their space is needed. A restart does not begin it anew.",
    )
    policy: str = knob(
        "lru",
        EVICTION,
        "Order in which blocks leave, the deepest block of a chain before its prefix. lru: unused for longest first. "
        "fifo: stored first, for comparison. lookahead: lru, but what waiting requests need comes last, the end of the "
        "queue first. predictive: the same with a prediction, learned from each use, of how soon blocks that nobody "
        "waits for are used again, in place of lru. docs/policies.md compares them.",
        choices=POLICIES,
    )

    lease_s: float = knob(
        30.0,
        LEASES,
        "How long a lease or a reservation lasts when the caller names no time. Shorter: a hung client's blocks move "
        "again sooner. Longer: slow copies need no renewal.",
        at_least=0.01,
    )
    lease_s_max: float = knob(
        300.0,
        LEASES,
        "The longest lease that a caller may ask for.",
        at_least=0.01,
        at_most=86_400,
    )

    hashes_per_call_max: int = knob(
        16_384,
        LIMITS,
        "Block hashes in one call; a longer prefix is asked for in several calls. Bounds the time for which one call "
        "can hold up the others.",
        at_least=1,
        at_most=1_000_000,
    )
    leases_per_instance_max: int = knob(
        4096, LIMITS, "Leases that one engine process may hold at a time.", at_least=1, at_most=1_000_000
    )
    reservations_per_instance_max: int = knob(
        1024, LIMITS, "Reservations that one engine process may hold at a time.", at_least=1, at_most=1_000_000
    )
    instances_max: int = knob(256, LIMITS, "Engine processes attached at a time.", at_least=1, at_most=65_536)
    connections_max: int = knob(
        512,
        LIMITS,
        "Processes connected to memory.sock at a time; each may have 64 more connections for its calls.",
        at_least=1,
        at_most=65_536,
    )
    namespaces_max: int = knob(
        64, LIMITS, "Namespaces that exist at a time, over all tenants.", at_least=1, at_most=65_536
    )
    sessions_max: int = knob(
        100_000,
        LIMITS,
        "Conversations remembered by name, per namespace; beyond it one loses its name, not its blocks.",
        at_least=1,
        at_most=100_000_000,
    )
    queue_entries_max: int = knob(
        4096,
        LIMITS,
        "Waiting requests that one engine process may tell of per namespace; it tells of those that start first.",
        at_least=1,
        at_most=65_536,
    )
    queue_blocks_max: int = knob(
        262_144,
        LIMITS,
        "Block hashes in one such queue, all its requests together; 8 to 64 bytes each, and as much again for "
        "requests that started.",
        at_least=1,
        at_most=100_000_000,
    )
    aliases_per_session_max: int = knob(
        16_384,
        LIMITS,
        "Blocks that one truncated conversation may name a second time, over all its truncations; beyond it the oldest "
        "truncation is given up. A few hundred bytes each.",
        at_least=1,
        at_most=100_000_000,
    )
    aliases_per_instance_max: int = knob(
        131_072,
        LIMITS,
        "The same, of all conversations that one engine process truncated, per namespace.",
        at_least=1,
        at_most=100_000_000,
    )
    aliases_max: int = knob(
        262_144,
        LIMITS,
        "The same, of all conversations of a namespace; the one truncated or used longest ago loses its oldest.",
        at_least=1,
        at_most=100_000_000,
    )
    explain_history_blocks: int = knob(
        65_536,
        LIMITS,
        "Blocks remembered after they left, per namespace, so that explain can say when and why; a few hundred bytes "
        "each. 0 remembers none.",
        at_most=100_000_000,
    )
    block_size_bytes_max: int = knob(
        1 * GIB, LIMITS, "Largest block that a namespace may declare.", at_least=1, at_most=1 << 40
    )
    message_bytes_max: int = knob(
        8 * MIB,
        LIMITS,
        "Largest message of a call. It must fit hashes_per_call_max hashes at "
        f"{checks.MESSAGE_BYTES_PER_HASH} bytes each.",
        at_least=64 * KIB,
        at_most=2 * GIB - 1,
    )

    checksum_threads: int = knob(
        1,
        LIFECYCLE,
        "Threads that checksum blocks after their commit. More finish sooner and take memory bandwidth from copies.",
        at_least=1,
        at_most=64,
    )
    drain_s: float = knob(
        20.0,
        LIFECYCLE,
        "How long running work may take after SIGTERM before the daemon exits anyway. Keep it below the supervisor's "
        "own limit (Kubernetes: terminationGracePeriodSeconds, 30 s by default).",
        at_most=3600,
    )
    log_level: str = knob("info", LIFECYCLE, "Least important log lines written to stderr.", choices=LOG_LEVELS)

    tcp_address: str = knob(
        "",
        NETWORK,
        'Address "host:port" for Stats, Explain and health over TCP with mutual TLS; empty: off. Blocks never travel '
        "there. All three TLS files are required.",
    )
    tls_cert_file: str = knob("", NETWORK, "The daemon's certificate chain, PEM.")
    tls_key_file: str = knob("", NETWORK, "The daemon's private key, PEM, readable by the daemon's user only.")
    tls_client_ca_file: str = knob("", NETWORK, "Authorities whose client certificates are accepted, PEM.")
    http_host: str = knob(
        "127.0.0.1",
        NETWORK,
        "Address of the HTTP port (/metrics, /livez, /readyz). It has no access control: anything but loopback shows "
        "metrics to whoever can reach it.",
    )
    http_port: int = knob(
        9477,
        NETWORK,
        "HTTP port; 0 takes any free one (the log says which), -1 turns it off.",
        at_least=-1,
        at_most=65_535,
    )

    prefill_tokens_per_gpu_s: float = knob(
        10_000.0,
        SAVINGS,
        "Prompt tokens that one GPU of this node prefills in a second, for kvservice_saved_prefill_gpu_seconds_total; "
        "the engine's own metrics say it. About 30 000 for 8 billion parameters in bf16 on an H200, a tenth of that "
        "for 70 billion; 0: GPU time and money are not estimated.",
        at_most=1e9,
    )
    gpu_hour_price: float = knob(
        0.0,
        SAVINGS,
        "Price of one GPU for an hour, in whatever currency kvservice_saved_money_total should have; 0: not estimated.",
        at_most=1e6,
    )

    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("tenants", "namespaces", "origins"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for name, described in KNOBS.items():
            described.check(getattr(self, name), self.origins.get(name, ""))
        checks.check_together({name: getattr(self, name) for name in KNOBS}, KNOBS, self.origins)

    @classmethod
    def load(cls, flags: Mapping[str, str], environ: Mapping[str, str], *, config_file: str = "") -> Self:
        """The effective configuration: defaults < TOML file < KVSERVICE_* variables < flags.

        Args:
            flags: text of each flag that was given, by knob name ("dram_bytes": "4GiB").
            environ: the environment, read now; XDG_RUNTIME_DIR and KVSERVICE_CONFIG count as well.
            config_file: path of the TOML file; empty: $KVSERVICE_CONFIG, and without that no file.

        Raises:
            ConfigError: a file cannot be read, a name is unknown, or a value is malformed or out of bounds.
        """
        found = sources.gather(KNOBS, flags, environ, config_file=config_file)
        return cls(**found.values, origins=found.origins)  # type: ignore[arg-type]  # checked by kind when read

    def origin(self, name: str) -> str:
        """Where the value of the knob `name` came from; "default" where nobody set it."""
        return self.origins.get(name, sources.DEFAULT)

    def rule_for(self, label: str) -> NamespaceRule:
        """Quotas, time to live and policy of a namespace with this label."""
        for glob, rule in self.namespaces.items():
            if fnmatch.fnmatchcase(label, glob):
                return rule
        return NamespaceRule(**{name: getattr(self, name) for name in RULE_SETTINGS})

    def to_toml(self) -> str:
        """The effective configuration as a TOML file with comments; loading it gives an equal Config."""
        return document.as_toml(KNOBS, {name: getattr(self, name) for name in KNOBS}, self.origins)


KNOBS = knobs_of(Config)
"""Every knob by name."""
