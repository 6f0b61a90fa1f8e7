"""mooncake_worker: the processes of mooncake_reference that have Mooncake's package: an owner of memory, or a user.

    python -m benchmarks.mooncake_worker owner MASTER SIZE_BYTES
    python -m benchmarks.mooncake_worker user MASTER BLOCK_SIZE_BYTES BLOCKS REPETITIONS

Either writes a JSON line when it is ready. A user then answers each line "put N" or "get N" with the seconds it took.
Both end when their stdin does. Runs in an environment that has Mooncake and need not have anything of ours.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from time import perf_counter

from mooncake.store import MooncakeDistributedStore

from benchmarks.measuring import FreshContents, PrivateBuffer, require_same_bytes

# What a process takes for its own requests; values larger than this go through registered buffers.
_LOCAL_BUFFER_BYTES = 16 << 20


def main(arguments: Sequence[str]) -> None:
    role, master, *numbers = arguments
    if role == "owner":
        store = _store(master, owned_bytes=int(numbers[0]))
        _tell({})
        sys.stdin.read()
    else:
        store = _store(master, owned_bytes=0)
        _serve(User(store, *map(int, numbers)))
    store.close()


class User:
    """Batches of values in Mooncake, from and into registered private buffers."""

    def __init__(self, store: MooncakeDistributedStore, block_size_bytes: int, blocks: int, repetitions: int) -> None:
        self._store = store
        self._sizes = [block_size_bytes] * blocks
        self._size_bytes = block_size_bytes * blocks
        self._contents = FreshContents(self._size_bytes, repetitions=repetitions + 1)
        self._destination = PrivateBuffer(self._size_bytes)
        self._keys: list[str] = []
        registered = (
            (self._contents.address(0), self._contents.capacity_bytes),
            (self._destination.address, self._destination.size_bytes),
        )
        for address, size_bytes in registered:
            _require([store.register_buffer(address, size_bytes)], 0, "register a buffer")

    def put(self, repetition: int) -> float:
        self.remove()
        keys = [secrets.token_hex(32) for _ in self._sizes]
        addresses = self._addresses(self._contents.address(repetition))
        started_s = perf_counter()
        outcomes = self._store.batch_put_from(keys, addresses, self._sizes)
        elapsed_s = perf_counter() - started_s
        _require(outcomes, 0, "store a batch")
        self._keys = keys
        return elapsed_s

    def get(self, repetition: int) -> float:
        self._destination.wipe()
        addresses = self._addresses(self._destination.address)
        started_s = perf_counter()
        outcomes = self._store.batch_get_into(self._keys, addresses, self._sizes)
        elapsed_s = perf_counter() - started_s
        _require(outcomes, self._sizes[0], "fetch a batch")
        expected = self._contents.address(repetition)
        require_same_bytes(expected, self._destination.address, self._size_bytes, "Mooncake")
        return elapsed_s

    def remove(self) -> None:
        """Remove the batch that is stored, if any, although its reading lease still runs."""
        if self._keys:
            _require(self._store.batch_remove(self._keys, force=True), 0, "remove a batch")
            self._keys = []

    def _addresses(self, start: int) -> list[int]:
        return [start + position * size_bytes for position, size_bytes in enumerate(self._sizes)]


def _store(master: str, *, owned_bytes: int) -> MooncakeDistributedStore:
    """A client of the master that lends the store so many bytes of its memory."""
    store = MooncakeDistributedStore()
    # With this word for metadata the processes find each other without a metadata server.
    outcome = store.setup("127.0.0.1", "P2PHANDSHAKE", owned_bytes, _LOCAL_BUFFER_BYTES, "tcp", "", master)
    _require([outcome], 0, "set up a client")
    return store


def _serve(user: User) -> None:
    _tell({})
    for line in sys.stdin:
        verb, repetition = line.split()
        _tell({"elapsed_s": user.put(int(repetition)) if verb == "put" else user.get(int(repetition))})
    user.remove()


def _require(outcomes: Sequence[int], wanted: int, what: str) -> None:
    if any(outcome != wanted for outcome in outcomes):
        raise RuntimeError(f"Mooncake did not {what}: {sorted(set(outcomes))} where {wanted} means success")


def _tell(answer: dict[str, float]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
