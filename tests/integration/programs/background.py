"""Saves and loads for ever in a thread, and counts what came of it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import kvservice_client as kv
from tests.blocks import chain, contents


class Background:
    """The thread of an engine under load. What it counts as `failed` must stay empty: the facade never raises."""

    def __init__(self, client: kv.Client, name: str, *, chains: int, blocks: int, size_bytes: int) -> None:
        self._client = client
        self._chains = [chain(f"{name}-{number}", blocks) for number in range(chains)]
        self._contents = [contents(hashes, size_bytes) for hashes in self._chains]
        self._size_bytes = size_bytes
        self._counted: Counter[str] = Counter()
        self._failed: list[str] = []
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    def counts(self) -> dict[str, Any]:
        """Calls by outcome, blocks loaded, and blocks loaded with wrong bytes."""
        return dict(self._counted) | {"failed": list(self._failed)}

    def stop(self) -> dict[str, Any]:
        """The final counts."""
        self._is_stopping.set()
        self._thread.join()
        return self.counts()

    def _run(self) -> None:
        chosen = random.Random(1)
        while not self._is_stopping.is_set():
            number = chosen.randrange(len(self._chains))
            try:
                self._once(number)
            except Exception as error:  # noqa: BLE001  # whatever it is, the test wants to see it
                self._failed.append(repr(error))
                return

    def _once(self, number: int) -> None:
        hashes, expected = self._chains[number], self._contents[number]
        destination = bytearray(len(expected))
        loaded = self._client.load(hashes, destination)
        size_bytes = loaded.blocks * self._size_bytes
        self._counted["loads"] += 1
        self._counted[f"load {loaded.reason.value}"] += 1
        self._counted["loaded blocks"] += loaded.blocks
        self._counted["wrong"] += int(destination[:size_bytes] != expected[:size_bytes])
        if loaded.blocks < len(hashes):
            saved = self._client.save(hashes, expected)
            self._counted[f"save {saved.reason.value}"] += 1
            self._counted["saved blocks"] += saved.saved
        if loaded.reason is kv.Reason.UNAVAILABLE:
            # An engine recomputes now; a loop that only spins would starve the thread that attaches.
            self._is_stopping.wait(0.01)
