"""options: what kv_connector_extra_config may say, checked by name and bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Settings of the adapter; every default suits most engines.

    Attributes:
        socket_dir: the daemon's directory; "": `kvservice_client.default_socket_dir()`.
        salt: separates namespaces that would otherwise be equal, a tenant's or an experiment's.
        weights_identity: what tells these weights from all others; "": found out from the model's files.
        attach_wait_s: how long the engine's start waits for a daemon; without one everything is a miss until it comes.
        lookup_wait_s: how long a request waits for the answer to its lookup before it is computed.
        promotion_wait_s: how long it waits for blocks that are on their way from NVMe to DRAM.
        recompute_if_faster: compute what is held where that is faster than loading it, by measured speeds; until the
            engine's is known, load. Off: load whatever is held, which leaves the processor to others.
        load_timeout_s: how long a load may take before its blocks are computed instead.
        save_timeout_s: how long one save may take before it is given up.
        saves_waiting_max: saves (one per request and step) that may wait; further ones are dropped.
        save_threads: saves at a time, never two of one request.
        load_threads: loads at a time.
        copy_threads: threads per copy.
        gpu_buffer_mib: GPU memory for blocks on their way, where the engine's are many small pieces; 0: 3 % of it.
    """

    socket_dir: str = ""
    salt: str = ""
    weights_identity: str = ""
    attach_wait_s: float = 1.0
    lookup_wait_s: float = 0.2
    promotion_wait_s: float = 2.0
    recompute_if_faster: bool = True
    load_timeout_s: float = 10.0
    save_timeout_s: float = 10.0
    saves_waiting_max: int = 256
    save_threads: int = 2
    load_threads: int = 4
    copy_threads: int = 2
    gpu_buffer_mib: int = 0

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> Self:
        """Check and convert.

        Raises:
            ValueError: a name is unknown, or a value is not of its type or out of bounds.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(extra) - set(fields))
        if unknown:
            raise ValueError(
                f"kv_connector_extra_config has unknown names {', '.join(unknown)}; known are {', '.join(fields)}"
            )
        return cls(**{name: _checked(name, value, type(fields[name].default)) for name, value in extra.items()})


def _checked(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ValueError(f"kv_connector_extra_config[{name!r}] is {value!r}, not a {kind.__name__}")
    if isinstance(value, float) and not 0.0 <= value <= 3600.0:
        raise ValueError(f"kv_connector_extra_config[{name!r}] is {value}, not from 0 to 3600 seconds")
    if isinstance(value, int) and kind is not bool and not 1 <= value <= 65_536:
        raise ValueError(f"kv_connector_extra_config[{name!r}] is {value}, not from 1 to 65536")
    return value
