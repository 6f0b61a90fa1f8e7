"""redis_reference: saving and loading against Redis on a Unix socket, a pipeline of the batch on one connection.

Debian's redis-server with its default threads, persistence off. The client below speaks RESP itself, so that a value
is sent from the caller's buffer and received into it without a copy in between; measured once beside redis-py 8.1 with
hiredis 3.5, it moves 1.5 to 3 times as many bytes in the same time, and the stronger reference is the one that counts.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_bytes
from time import perf_counter

from benchmarks.daemon import HASH_SIZE_BYTES
from benchmarks.measuring import FreshContents, PrivateBuffer, Record, Skipped, require_same_bytes
from benchmarks.settings import Settings
from benchmarks.versus import Opponent, Shape, compare

_STOP_TIMEOUT_S = 20.0
_END = b"\r\n"


def measure(settings: Settings) -> Iterator[Record]:
    """vs_redis_get_* and vs_redis_put_*.

    Raises:
        Skipped: redis-server is not installed.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise Skipped("redis-server is not installed (scripts/install_bench_references.sh installs it)")
    with _running_redis(program) as address, RedisConnection(address) as connection:

        @contextmanager
        def opponent_with(shape: Shape) -> Iterator[Opponent]:
            opponent = RedisOpponent(connection, shape, repetitions=settings.repetitions)
            yield opponent
            opponent.delete()

        yield from compare("redis", opponent_with, settings)


@contextmanager
def _running_redis(program: str) -> Iterator[str]:
    """A Redis without persistence; yields its socket's path."""
    with tempfile.TemporaryDirectory(prefix="redis-bench-") as directory:
        address = str(Path(directory) / "redis.sock")
        process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", address, "--save", "", "--appendonly", "no", "--dir", directory],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            seen = []
            for line in process.stdout:
                seen.append(line)
                if "ready to accept connections at" in line:
                    break
            else:
                raise RuntimeError(f"redis-server ended before it was ready:\n{''.join(seen)}")
            yield address
        finally:
            process.terminate()
            process.wait(_STOP_TIMEOUT_S)


class RedisConnection:
    """As much of RESP as a pipeline of SET, GET and DEL needs. Calls block."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address)

    def __enter__(self) -> RedisConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def set_all(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """One pipeline of SETs, sent straight from the values' memory."""
        for key, value in zip(keys, values, strict=True):
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, len(value))
            self._send([memoryview(head), value, memoryview(_END)])
        self._expect(b"+OK\r\n" * len(keys))

    def get_all(self, keys: Sequence[bytes], destinations: Sequence[memoryview]) -> None:
        """One pipeline of GETs, received straight into the destinations, which fit exactly."""
        self._socket.sendall(b"".join(_command(b"GET", key) for key in keys))
        heads = [b"$%d\r\n" % len(destination) for destination in destinations]
        self._expect(heads[0])
        for destination, next_head in zip(destinations, [*heads[1:], b""], strict=True):
            # Received in one call with what separates two values, to save calls.
            between = bytearray(len(_END) + len(next_head))
            self._receive([destination, memoryview(between)])
            if between != _END + next_head:
                raise RuntimeError(f"Redis answered {bytes(between)!r} where {_END + next_head!r} was due")

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove those keys."""
        self._socket.sendall(_command(b"DEL", *keys))
        self._expect(b":%d\r\n" % len(keys))

    def _expect(self, reply: bytes) -> None:
        received = bytearray(len(reply))
        self._receive([memoryview(received)])
        if received != reply:
            raise RuntimeError(f"Redis answered {bytes(received[:100])!r} where {reply[:100]!r} was due")

    def _send(self, parts: list[memoryview]) -> None:
        while parts:
            parts = _after(parts, self._socket.sendmsg(parts))

    def _receive(self, parts: list[memoryview]) -> None:
        while parts:
            received_bytes = self._socket.recvmsg_into(parts)[0]
            if not received_bytes:
                raise RuntimeError("Redis hung up")
            parts = _after(parts, received_bytes)


class RedisOpponent:
    """Batches of values in Redis, from and into private buffers of this process."""

    def __init__(self, connection: RedisConnection, shape: Shape, *, repetitions: int) -> None:
        self._connection = connection
        self._shape = shape
        self._contents = FreshContents(shape.size_bytes, repetitions=repetitions + 1)
        self._destination = PrivateBuffer(shape.size_bytes)
        self._keys: list[bytes] = []

    def put(self, repetition: int) -> float:
        self.delete()
        keys = [token_bytes(HASH_SIZE_BYTES) for _ in range(self._shape.blocks)]
        values = self._pieces(self._contents.view(repetition))
        started_s = perf_counter()
        self._connection.set_all(keys, values)
        elapsed_s = perf_counter() - started_s
        self._keys = keys
        return elapsed_s

    def get(self, repetition: int) -> float:
        self._destination.wipe()
        destinations = self._pieces(self._destination.view)
        started_s = perf_counter()
        self._connection.get_all(self._keys, destinations)
        elapsed_s = perf_counter() - started_s
        address, size_bytes = self._contents.address(repetition), self._shape.size_bytes
        require_same_bytes(address, self._destination.address, size_bytes, "Redis")
        return elapsed_s

    def delete(self) -> None:
        """Remove the batch that is stored, if any."""
        if self._keys:
            self._connection.delete(self._keys)
            self._keys = []

    def _pieces(self, view: memoryview) -> list[memoryview]:
        size_bytes = self._shape.block_size_bytes
        return [view[start : start + size_bytes] for start in range(0, self._shape.size_bytes, size_bytes)]


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _after(parts: list[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left of the parts when so many bytes of them are done."""
    for position, part in enumerate(parts):
        if done_bytes < len(part):
            return [part[done_bytes:], *parts[position + 1 :]]
        done_bytes -= len(part)
    return []
