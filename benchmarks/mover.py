"""mover: a process that moves blocks to and from NVMe: `python -m benchmarks.mover SOCKET_DIR BLOCKS BYTES`.

For each line on stdin two chains of BLOCKS blocks of BYTES are committed and become durable while two others, on NVMe
only, come back; then it says "moved". It touches none of the bytes: what is measured is the daemon.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import kvservice_client as kv
from benchmarks.batches import fresh_hashes
from benchmarks.daemon import Daemon, attach, await_durable, await_memory
from kvservice_proto.v1 import kvservice_pb2 as pb

_CHAINS = 2
_PAUSE_S = 0.05


class Moving:
    """Chains of one namespace, the oldest first."""

    def __init__(self, client: kv.Client, blocks: int) -> None:
        self._client = client
        self._blocks = blocks
        self._chains: list[Sequence[bytes]] = []

    def put(self) -> None:
        """Two more chains, durable."""
        for _ in range(_CHAINS):
            chain = fresh_hashes(self._blocks)
            self._reservation(chain).commit()
            await_durable(self._client, chain[-1])
            self._chains.append(chain)

    def _read(self, chain: Sequence[bytes]) -> None:
        came = 0
        while came < self._blocks:
            with self._client.get(chain, deadline_s=60) as lease:
                came = len(lease.blocks)
                if lease.miss not in {pb.MISS_REASON_UNSPECIFIED, pb.MISS_REASON_OVER_LIMIT}:
                    raise RuntimeError(f"{came} of {self._blocks} blocks came, miss reason {lease.miss}")
            if came < self._blocks:
                sleep(_PAUSE_S)  # the chains that go are not durable yet, and fill the memory

    def _reservation(self, chain: Sequence[bytes]) -> kv.Reservation:
        while True:
            try:
                return self._client.put(chain, deadline_s=60)
            except kv.CapacityExhausted:
                sleep(_PAUSE_S)  # the chains that come back are leased until they are here

    def get(self) -> None:
        """Two chains from NVMe: of those that are not in DRAM, the oldest."""
        came = 0
        for chain in list(self._chains):
            if came < _CHAINS and self._client.lookup(chain).dram_blocks == 0:
                self._read(chain)
                self._chains.remove(chain)
                self._chains.append(chain)
                came += 1
        if came < _CHAINS:
            raise RuntimeError(f"only {came} chains are on NVMe alone")


def main(socket_dir: str, blocks: int, block_size_bytes: int) -> None:
    """Move until stdin ends."""
    client = attach(Daemon(0, socket_dir), "bench moving", block_size_bytes=block_size_bytes)
    await_memory(client, blocks * block_size_bytes)
    moving = Moving(client, blocks)
    for _ in range(3):
        moving.put()  # more than DRAM holds
    with ThreadPoolExecutor(2) as pool:
        for _ in sys.stdin:
            for done in [pool.submit(moving.put), pool.submit(moving.get)]:
                done.result()
            print("moved", flush=True)
    client.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
