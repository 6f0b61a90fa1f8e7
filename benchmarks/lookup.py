"""lookup: what asking costs, against a bare gRPC call that carries as many bytes and asks nothing.

The reference is a grpc.aio unary server on a Unix socket without any work, metadata or protobuf, called with a request
and answering with a response of exactly the sizes of ours. The call goes from the same thread through a channel with
the client library's own options, which are a little faster than gRPC's defaults. Ours is the client library's lookup of
a whole prefix, every block of which is held. It goes over a call connection; what that gives is seen against a client
that has none and asks the same over gRPC: call after call, and each after a pause in which both sides fall asleep.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, sleep

import grpc

import kvservice_client as kv
from benchmarks.daemon import HASH_SIZE_BYTES, attach, await_memory, running_daemon
from benchmarks.echo_server import METHOD, REPLY_SIZE_BYTES
from benchmarks.filling import BLOCK_SIZE_BYTES, fill
from benchmarks.measuring import Record, take_turns
from benchmarks.settings import Settings
from kvservice_client.calls import CONTROL_SOCKET, open_channel
from kvservice_proto.v1 import kvservice_pb2 as pb

PREFIX_BLOCKS = (1, 128, 2048)
_PAUSE_S = 0.005
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
    with _filled(settings.index_blocks) as (index, over_grpc):
        turns = take_turns(
            reference=lambda repetition: _echo_p50s(echo, settings.lookup_calls),
            ours=lambda repetition: index.p50s(settings.lookup_calls, repetition),
            repetitions=settings.repetitions,
            title="lookup",
        )
        ways = take_turns(
            reference=lambda repetition: over_grpc.p50s_by_pause(settings.lookup_calls, repetition),
            ours=lambda repetition: index.p50s_by_pause(settings.lookup_calls, repetition),
            repetitions=settings.repetitions,
            title="lookup over gRPC and over the call socket",
        )
    for blocks in PREFIX_BLOCKS:
        yield turns.latency(f"lookup_{blocks}_ratio", ours=str(blocks), reference=str(blocks))
    yield ways.latency("lookup_128_socket_ratio", ours="at once", reference="at once")
    yield ways.latency("lookup_128_socket_paused_ratio", ours="after a pause", reference="after a pause")


def _growth(settings: Settings, echo: Call) -> Iterator[Record]:
    small_blocks, large_blocks = settings.growth_blocks
    with _filled(small_blocks) as (small, _), _filled(large_blocks) as (large, _):

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

    def __init__(self, client: kv.Client, chains: Sequence[Sequence[bytes]]) -> None:
        self._client = client
        self._chains = chains

    def p50s(self, calls: int, seed: int, *, prefixes: Sequence[int] = PREFIX_BLOCKS) -> dict[str, float]:
        """Median seconds of that many lookups, by the number of hashes asked for."""
        return {str(blocks): self._p50(blocks, calls, seed) for blocks in prefixes}

    def p50s_by_pause(self, calls: int, seed: int) -> dict[str, float]:
        """Median seconds of that many lookups of 128 hashes, one after the other and with pauses between them."""
        return {
            "at once": self._p50(128, calls, seed),
            "after a pause": self._p50(128, calls, seed, pause_s=_PAUSE_S),
        }

    def _p50(self, blocks: int, calls: int, seed: int, *, pause_s: float = 0.0) -> float:
        long_enough = [chain for chain in self._chains if len(chain) >= blocks]
        source = random.Random(seed)
        elapsed_s = []
        for _ in range(_WARM_UP_CALLS + calls):
            hashes = source.choice(long_enough)[:blocks]
            if pause_s:
                sleep(pause_s)
            started_s = perf_counter()
            found = self._client.lookup(hashes)
            elapsed_s.append(perf_counter() - started_s)
            if found.blocks != blocks:
                raise RuntimeError(f"{found.blocks} of {blocks} blocks were found: {found}")
        return statistics.median(elapsed_s[_WARM_UP_CALLS:])


@contextmanager
def _filled(blocks: int) -> Iterator[tuple[FilledIndex, FilledIndex]]:
    """A daemon whose only namespace holds that many blocks, asked over call connections, and over gRPC."""
    dram_bytes = int(blocks * (1 + _SPARE_FRACTION)) * BLOCK_SIZE_BYTES
    with running_daemon(dram_bytes=dram_bytes) as daemon, ExitStack() as clients:
        label = f"bench {blocks} blocks"
        ours, over_grpc = (
            clients.enter_context(attach(daemon, label, block_size_bytes=BLOCK_SIZE_BYTES)) for _ in range(2)
        )
        over_grpc.link.unary.close()
        await_memory(ours, dram_bytes - BLOCK_SIZE_BYTES)
        chains = fill(ours, blocks)
        yield FilledIndex(ours, chains), FilledIndex(over_grpc, chains)


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
