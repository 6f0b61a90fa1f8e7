"""lookup: what asking costs, against a bare gRPC call that carries as many bytes and asks nothing.

The reference is a grpc.aio unary server on a Unix socket without any work, metadata or protobuf, called with a request
and answering with a response of exactly the sizes of ours. The call goes from the same thread through a channel with
the client library's own options, which are a little faster than gRPC's defaults. Ours is the client library's lookup of
a whole prefix, every block of which is held.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import grpc

import kvservice_client as kv
from benchmarks.daemon import HASH_SIZE_BYTES, attached
from benchmarks.echo_server import METHOD, REPLY_SIZE_BYTES
from benchmarks.filling import BLOCK_SIZE_BYTES, fill
from benchmarks.measuring import Record, take_turns
from benchmarks.settings import Settings
from kvservice_client.calls import CONTROL_SOCKET, open_channel
from kvservice_proto.v1 import kvservice_pb2 as pb

PREFIX_BLOCKS = (1, 128, 2048)
_WARM_UP_CALLS = 50
_SPARE_FRACTION = 0.25
_SERVER_STOP_TIMEOUT_S = 10.0

Call = Callable[[bytes], bytes]


def measure(settings: Settings) -> Iterator[Record]:
    """lookup_*_ratio over an index of 100,000 blocks, then lookup_1_growth and the reports at a million."""
    with running_echo() as echo:
        yield from _ratios(settings, echo)
        yield from _growth(settings, echo)


def _ratios(settings: Settings, echo: Call) -> Iterator[Record]:
    with _filled(settings.index_blocks) as index:
        turns = take_turns(
            reference=lambda repetition: _echo_p50s(echo, settings.lookup_calls),
            ours=lambda repetition: index.p50s(settings.lookup_calls, repetition),
            repetitions=settings.repetitions,
            title="lookup",
        )
    for blocks in PREFIX_BLOCKS:
        yield turns.latency(f"lookup_{blocks}_ratio", ours=str(blocks), reference=str(blocks))


def _growth(settings: Settings, echo: Call) -> Iterator[Record]:
    small_blocks, large_blocks = settings.growth_blocks
    with _filled(small_blocks) as small, _filled(large_blocks) as large:

        def reference(repetition: int) -> Mapping[str, float]:
            p50s = small.p50s(settings.lookup_calls, repetition, prefixes=(1,))
            return {"small index": p50s["1"], **_echo_p50s(echo, settings.lookup_calls)}

        turns = take_turns(
            reference=reference,
            ours=lambda repetition: large.p50s(settings.lookup_calls, repetition),
            repetitions=settings.repetitions,
            title="lookup in a large index",
        )
    yield turns.latency("lookup_1_growth", ours="1", reference="small index")
    for blocks in PREFIX_BLOCKS:
        yield turns.latency(f"lookup_{blocks}_in_large_index", ours=str(blocks), reference=str(blocks))


class FilledIndex:
    """A daemon's index whose chains are known, and lookups of random prefixes of them."""

    def __init__(self, client: kv.Client, blocks: int) -> None:
        self._client = client
        self._chains = fill(client, blocks)

    def p50s(self, calls: int, seed: int, *, prefixes: Sequence[int] = PREFIX_BLOCKS) -> dict[str, float]:
        """Median seconds of that many lookups, by the number of hashes asked for."""
        return {str(blocks): self._p50(blocks, calls, seed) for blocks in prefixes}

    def _p50(self, blocks: int, calls: int, seed: int) -> float:
        long_enough = [chain for chain in self._chains if len(chain) >= blocks]
        source = random.Random(seed)
        elapsed_s = []
        for _ in range(_WARM_UP_CALLS + calls):
            hashes = source.choice(long_enough)[:blocks]
            started_s = perf_counter()
            found = self._client.lookup(hashes)
            elapsed_s.append(perf_counter() - started_s)
            if found.blocks != blocks:
                raise RuntimeError(f"{found.blocks} of {blocks} blocks were found: {found}")
        return statistics.median(elapsed_s[_WARM_UP_CALLS:])


@contextmanager
def _filled(blocks: int) -> Iterator[FilledIndex]:
    """A daemon whose only namespace holds that many blocks."""
    dram_bytes = int(blocks * (1 + _SPARE_FRACTION)) * BLOCK_SIZE_BYTES
    with attached(f"bench {blocks} blocks", block_size_bytes=BLOCK_SIZE_BYTES, dram_bytes=dram_bytes) as client:
        yield FilledIndex(client, blocks)


@contextmanager
def running_echo() -> Iterator[Call]:
    """The bare server in a process of its own; yields the call that reaches it, over the client library's channel."""
    with tempfile.TemporaryDirectory(prefix="echo-bench-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.echo_server", str(Path(directory) / CONTROL_SOCKET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError("the echo server ended before it was ready")
            with open_channel(directory) as channel:
                call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
                yield call
        finally:
            process.stdin.close()
            process.wait(_SERVER_STOP_TIMEOUT_S)


def _echo_p50s(echo: Call, calls: int) -> dict[str, float]:
    """Median seconds of that many bare calls, by the number of hashes whose lookup they have the size of."""
    return {str(blocks): _echo_p50(echo, blocks, calls) for blocks in PREFIX_BLOCKS}


def _echo_p50(echo: Call, blocks: int, calls: int) -> float:
    request, reply_size_bytes = bare_messages(blocks)
    elapsed_s = []
    for _ in range(_WARM_UP_CALLS + calls):
        started_s = perf_counter()
        reply = echo(request)
        elapsed_s.append(perf_counter() - started_s)
        assert len(reply) == reply_size_bytes, f"{len(reply)} bytes came back"
    return statistics.median(elapsed_s[_WARM_UP_CALLS:])


def bare_messages(blocks: int) -> tuple[bytes, int]:
    """A request of the size of a lookup of that many blocks, and the size in bytes of the answer to a full hit."""
    asked = pb.LookupRequest(namespace_id=1, hashes=bytes(blocks * HASH_SIZE_BYTES)).ByteSize()
    run = pb.LookupRun(blocks=blocks, held=pb.TIER_DRAM)
    answered = pb.LookupResponse(hit_blocks=blocks, runs=[run]).ByteSize()
    return answered.to_bytes(REPLY_SIZE_BYTES, "little") + bytes(asked - REPLY_SIZE_BYTES), answered
