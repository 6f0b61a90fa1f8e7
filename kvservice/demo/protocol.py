"""protocol: the messages between the demo and its engine processes, one JSON object per line."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np

Logits: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"

# ------------------------------------------------------------ demo -> engine


@dataclass(frozen=True)
class Generate:
    """Run one turn; answered by FirstToken and Finished."""

    request_id: str
    session_id: str
    tokens: list[int]
    history_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class MakeUserTurns:
    """Ask for what the users will say; answered by UserTurns."""

    conversations: int
    turns: int
    first_turn_tokens: int
    next_turn_tokens: int


@dataclass(frozen=True)
class Drain:
    """Wait until everything is saved; answered by Drained."""

    timeout_s: float


@dataclass(frozen=True)
class CorruptLoads:
    """From now on, flip the sign of every loaded number before it is used (or stop doing so); answered by Done."""

    armed: bool


@dataclass(frozen=True)
class Quit:
    """End; the process exits with status 0."""


# ------------------------------------------------------------ engine -> demo


@dataclass(frozen=True)
class Ready:
    """The model is loaded and, if there is to be a service, attached; `plane`: how blocks travel to and from it."""

    process_id: int
    model: str
    dtype: str
    device: str
    layers: int
    vocabulary: int
    block_size_bytes: int
    tokens_per_block: int
    attached: bool
    plane: str


@dataclass(frozen=True)
class FirstToken:
    """A request's first token is there."""

    request_id: str
    ttft_s: float


@dataclass(frozen=True)
class Finished:
    """A request is done. Logits are those after the prompt, float32 little-endian in base64.

    `dropped_tokens`: of the conversation, left out of the prompt so that it fits. `dram_blocks` and `nvme_blocks`:
    where the blocks that it loaded were when it asked for them.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    dropped_tokens: int
    reused_tokens: int
    computed_tokens: int
    dram_blocks: int
    nvme_blocks: int
    ttft_s: float
    logits_base64: str

    @property
    def logits(self) -> Logits:
        """Logits after the prompt's last token, [vocabulary]."""
        return np.frombuffer(base64.b64decode(self.logits_base64), dtype="<f4").astype(np.float32)


@dataclass(frozen=True)
class UserTurns:
    """Token ids, by conversation and turn."""

    tokens: list[list[list[int]]]
    from_tokenizer: bool


@dataclass(frozen=True)
class Drained:
    """All saves ended, or did not in time; and what the adapter counted."""

    in_time: bool
    stats: dict[str, object]


@dataclass(frozen=True)
class Done:
    """The command was carried out."""


@dataclass(frozen=True)
class Failed:
    """The command could not be carried out, and why."""

    message: str


Command: TypeAlias = Generate | MakeUserTurns | Drain | CorruptLoads | Quit
Event: TypeAlias = Ready | FirstToken | Finished | UserTurns | Drained | Done | Failed

_COMMAND_KINDS: tuple[type[Command], ...] = (Generate, MakeUserTurns, Drain, CorruptLoads, Quit)
_EVENT_KINDS: tuple[type[Event], ...] = (Ready, FirstToken, Finished, UserTurns, Drained, Done, Failed)
_COMMANDS: dict[str, Callable[..., Command]] = {kind.__name__: kind for kind in _COMMAND_KINDS}
_EVENTS: dict[str, Callable[..., Event]] = {kind.__name__: kind for kind in _EVENT_KINDS}

KindT = TypeVar("KindT")


class ProtocolError(ValueError):
    """A line is no message."""


def encode(message: Command | Event) -> str:
    """One line, without its newline."""
    return json.dumps({"kind": type(message).__name__, **dataclasses.asdict(message)}, separators=(",", ":"))


def decode_command(line: str) -> Command:
    """What the demo says, from a line. Raises ProtocolError."""
    return _decode(line, _COMMANDS)


def decode_event(line: str) -> Event:
    """What an engine says, from a line. Raises ProtocolError."""
    return _decode(line, _EVENTS)


def _decode(line: str, kinds: Mapping[str, Callable[..., KindT]]) -> KindT:
    try:
        fields = json.loads(line)
        return kinds[fields.pop("kind")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"no message of the demo's protocol: {line[:200]!r}") from error


def encode_logits(logits: Logits) -> str:
    """For Finished.logits_base64."""
    return base64.b64encode(logits.astype("<f4").tobytes()).decode("ascii")
