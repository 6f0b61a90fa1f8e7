"""Many clients of one process that do everything at random for a while, and check every byte they read.

Arguments: socket directory, seed, clients, seconds. Prints one JSON object: what was done, and what must not be.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import kvservice_client as kv
from tests.blocks import chain, content, namespace

NAMESPACES = (namespace("small", block_size_bytes=4096), namespace("odd", block_size_bytes=20_001))
CHAINS = 24
BLOCKS_MAX = 24


remembered_content = functools.cache(content)


class Hammer:
    """One client in a thread of its own."""

    def __init__(self, socket_dir: str, seed: int, ends_at_s: float) -> None:
        self._socket_dir = socket_dir
        self._random = random.Random(seed)
        self._ends_at_s = ends_at_s
        self._namespace = self._random.choice(NAMESPACES)
        self._size_bytes = self._namespace.block_size_bytes
        self._client = self._attach()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._actions: list[tuple[int, Callable[[], None]]] = [
            (30, self._load),
            (25, self._save),
            (12, self._get),
            (12, self._put),
            (6, self._put_behind),
            (4, self._ask),
            (2, self._forget_session),
            (1, self._forget_namespace),
            (1, self._abandon),
            (1, self._attach_anew),
        ]

    def run(self) -> None:
        weights, actions = zip(*self._actions, strict=True)
        while time.monotonic() < self._ends_at_s:
            (action,) = self._random.choices(actions, weights)
            try:
                action()
            except (kv.InternalError, kv.InvalidRequest) as error:
                self.failures.append(f"{action.__name__}: {error!r}")
            except kv.KVServiceError as error:
                self.counts[type(error).__name__] += 1
            except Exception as error:  # noqa: BLE001  # whatever it is, the test wants to see it
                self.failures.append(f"{action.__name__}: {error!r}")
                return
        self._client.close()

    # ----------------------------------------------------------------- actions

    def _load(self) -> None:
        hashes = self._prefix()
        destination = bytearray(len(hashes) * self._size_bytes)
        loaded = self._client.load(hashes, destination, session_id=self._session())
        self.counts["loaded"] += loaded.blocks
        for position in range(loaded.blocks):
            start = position * self._size_bytes
            self._compare(hashes[position], destination[start : start + self._size_bytes])

    def _save(self) -> None:
        hashes = self._prefix()
        source = [self._content(block_hash) for block_hash in hashes]
        self.counts["saved"] += self._client.save(hashes, source, session_id=self._session()).saved

    def _get(self) -> None:
        hashes = self._prefix()
        with self._client.get(hashes, lease_s=self._lease_s(), max_blocks=self._random.randrange(9)) as lease:
            copies = [bytes(view.memory) for view in lease.blocks]
            if self._random.random() < 0.2:
                lease.renew()
            for position, copied in enumerate(copies):
                if lease.valid(position):
                    self._compare(hashes[position], copied)
            self.counts["leased"] += len(copies)

    def _put(self) -> None:
        self._write_some(self._prefix(), parent=b"")

    def _put_behind(self) -> None:
        hashes = self._prefix()
        at = self._random.randrange(len(hashes))
        self._write_some(hashes[at:], parent=hashes[at - 1] if at else b"")

    def _write_some(self, hashes: list[bytes], *, parent: bytes) -> None:
        """Reserve, write, and commit all of it, a part of it, or nothing."""
        with self._client.put(hashes, parent=parent, lease_s=self._lease_s(), session_id=self._session()) as reserved:
            places = list(range(len(reserved.reserved)))
            chosen = self._random.sample(places, self._random.randrange(len(places) + 1))
            for place in chosen:
                position, view = reserved.reserved[place]
                view.memory[:] = self._content(hashes[position])
            if chosen:
                outcomes = reserved.commit(chosen)
                self.counts["committed"] += outcomes.count(kv.Committed.PUBLISHED)

    def _ask(self) -> None:
        hashes = self._prefix()
        self._client.lookup(hashes)
        self._client.prefetch(hashes)
        self._client.explain(hashes[0])
        self._client.stats()

    def _forget_session(self) -> None:
        self._client.forget_session(self._session() or "s0")

    def _forget_namespace(self) -> None:
        if self._random.random() < 0.1:
            self._client.forget_namespace()

    def _abandon(self) -> None:
        """Hold something until it has expired, and only then end it."""
        with self._client.get(self._prefix(), lease_s=0.05), self._client.put(self._prefix(), lease_s=0.05):
            time.sleep(0.1)  # the time that is meant to pass

    def _attach_anew(self) -> None:
        if self._random.random() < 0.3:
            self._client.close()
            self._client = self._attach()

    # --------------------------------------------------------------- privately

    def _attach(self) -> kv.Client:
        return kv.attach(self._namespace, socket_dir=self._socket_dir, attach_timeout_s=10.0, copy_threads=1)

    def _prefix(self) -> list[bytes]:
        name = f"{self._namespace.label}/{self._random.randrange(CHAINS)}"
        return chain(name, self._random.randrange(1, BLOCKS_MAX + 1))

    def _session(self) -> str:
        return self._random.choice(("", f"s{self._random.randrange(20)}"))

    def _lease_s(self) -> float:
        return self._random.choice((0.0, 0.0, 0.02, 1.0))

    def _content(self, block_hash: bytes) -> bytes:
        return remembered_content(block_hash, self._size_bytes)

    def _compare(self, block_hash: bytes, copied: bytes | bytearray) -> None:
        if copied != self._content(block_hash):
            self.failures.append(f"wrong bytes for {block_hash.hex()}")


def main() -> None:
    """Run them all, and print what came of it."""
    socket_dir, seed, clients, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    ends_at_s = time.monotonic() + seconds
    hammers = [Hammer(socket_dir, seed * 1000 + number, ends_at_s) for number in range(clients)]
    threads = [threading.Thread(target=hammer.run) for hammer in hammers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts: Counter[str] = Counter()
    for hammer in hammers:
        counts += hammer.counts
    failures = [failure for hammer in hammers for failure in hammer.failures]
    print(json.dumps({"counts": dict(counts), "failures": failures[:20]}))  # noqa: T201  # the answer


if __name__ == "__main__":
    main()
