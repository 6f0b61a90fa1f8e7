"""requests: what is replayed: requests as chains of block hashes, read from a trace in Mooncake's format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvservice.blocks import BlockHash
from kvservice.errors import StartupError

TRACE_BLOCK_TOKENS = 512
"""Tokens per hash id in Mooncake's traces."""


class TraceError(StartupError):
    """The trace cannot be read; the message names the line and what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """A conversation was cut for this prompt: its first blocks are blocks of before under new names."""

    chain: Sequence[BlockHash]
    """As it was, root first."""
    first: int
    """Its first block that stayed; all behind it did."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt. Its last block may be partly filled; nobody shares that one."""

    number: int
    arrival_s: float
    """From the start of the workload; of a later turn of a conversation only nominal: see `think_s`."""
    hashes: Sequence[BlockHash]
    """The prompt's blocks."""
    input_tokens: int
    output_tokens: int
    stored: Sequence[BlockHash]
    """The blocks that are held afterwards: the prompt's, and the full ones of the reply where they are known."""
    follows: int = -1
    """The number of the conversation's turn before, in a generated workload; -1: none."""
    think_s: float = 0.0
    """From the end of that turn's reply to this prompt."""
    truncated: Truncated | None = None


def block_hash(number: int) -> BlockHash:
    """The hash of a block that is known by a number."""
    return BlockHash(number.to_bytes(8, "little"))


def read_trace(path: Path, *, requests_max: int = 0) -> list[Request]:
    """The requests of a JSON-lines file, by time of arrival.

    Each line: {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per 512 tokens]}.

    Args:
        requests_max: only so many; 0: all.

    Raises:
        TraceError: the file cannot be read or a line is not of that form.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            requests = [_request(path, number, line) for number, line in enumerate(_first(lines, requests_max))]
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from None
    if not requests:
        raise TraceError(f"{path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def unique_blocks(requests: Iterable[Request]) -> int:
    """How many different blocks the requests have."""
    return len({one for request in requests for one in request.stored})


def _first(lines: Iterable[str], requests_max: int) -> Iterable[str]:
    for number, line in enumerate(lines):
        if requests_max and number >= requests_max:
            return
        if line.strip():
            yield line


def _request(path: Path, number: int, line: str) -> Request:
    try:
        fields = json.loads(line)
        ids = [int(one) for one in fields["hash_ids"]]
        input_tokens, output_tokens = int(fields["input_length"]), int(fields["output_length"])
        arrival_s = float(fields["timestamp"]) / 1000.0
        hashes = [block_hash(one) for one in ids]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise TraceError(f"{path}, request {number + 1}: {type(error).__name__}: {error}") from None
    if not ids or len(set(ids)) != len(ids) or min(input_tokens, output_tokens) < 0 or not 0 <= arrival_s < 1e9:
        raise TraceError(
            f"{path}, request {number + 1}: wants distinct hash_ids, lengths and a timestamp that are not negative"
        )
    return Request(number, arrival_s, hashes, input_tokens, output_tokens, hashes)
