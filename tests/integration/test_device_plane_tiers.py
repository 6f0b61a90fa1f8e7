"""The device plane beside the rest of the daemon: blocks from NVMe, draining, the second socket, other callers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvservice_client as kv
from kvservice_client import Reason
from kvservice_client.device import CachePart, DeviceCache, DeviceKV
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, namespace
from tests.daemons import DaemonThread
from tests.devices import FakeGpu
from tests.waiting import eventually

pytestmark = pytest.mark.integration

MIB = 1 << 20
BLOCK, BLOCKS = 64 * 1024, 48

MakeDaemonThread = Callable[..., DaemonThread]


class Engine:
    """A client with a cache that is contiguous across layers."""

    def __init__(self, gpu: FakeGpu, daemon: DaemonThread, *, seed: int = 0) -> None:
        self.memory = gpu.allocate(BLOCK * BLOCKS)
        self.array = gpu.array(self.memory).reshape(BLOCKS, BLOCK)
        self.array[:] = np.random.default_rng(seed).integers(0, 256, self.array.shape, dtype=np.uint8)
        self.client = kv.attach(namespace(block_size_bytes=BLOCK), socket_dir=daemon.socket_dir)
        cache = DeviceCache(BLOCKS, (CachePart(self.memory, BLOCK, BLOCK),))
        self.kv = DeviceKV(self.client, cache, driver=gpu.driver)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kv.close()
        self.client.close()


def on_disk(make_daemon_thread: MakeDaemonThread, directory: Path, gpu: FakeGpu) -> DaemonThread:
    return make_daemon_thread(
        directory="daemon",
        driver=gpu.driver,
        dram_bytes=4 * MIB,
        nvme_dirs=str(directory / "nvme"),
        nvme_bytes=64 * MIB,
        nvme_segment_bytes=4 * MIB,
        nvme_write_behind_s=0.05,
    )


def move_to_nvme(engine: Engine) -> None:
    """Save others until the first 12 blocks of "a" have left DRAM, as they may once they are durable."""
    numbers = itertools.count()

    def has_left() -> bool:
        engine.kv.save(chain(f"other {next(numbers)}", 40), range(40))
        looked = engine.client.lookup(chain("a", 12))
        return looked.blocks == 12 and looked.dram_blocks == 0

    eventually(has_left)


def test_blocks_that_are_on_nvme_only_are_read_and_then_copied(
    make_daemon_thread: MakeDaemonThread, short_path: Path, gpu: FakeGpu
) -> None:
    daemon = on_disk(make_daemon_thread, short_path, gpu)
    with Engine(gpu, daemon) as engine:
        kept = engine.array[:12].copy()
        assert engine.kv.save(chain("a", 12), range(12)).saved == 12
        move_to_nvme(engine)
        load = engine.kv.load(chain("a", 12), range(30, 42))
        assert load.result() == kv.LoadResult(12, Reason.OK)
        assert np.array_equal(engine.array[30:42], kept)
        eventually(lambda: daemon.holds() == (0, 0, 0))


def test_a_block_that_is_damaged_on_disk_ends_the_load_before_it(
    make_daemon_thread: MakeDaemonThread, short_path: Path, gpu: FakeGpu
) -> None:
    daemon = on_disk(make_daemon_thread, short_path, gpu)
    with Engine(gpu, daemon) as engine:
        engine.kv.save(chain("a", 12), range(12))
        kept = engine.array[:12].copy()
        move_to_nvme(engine)
        needle = kept[7].tobytes()[:4096]
        damaged = 0
        for path in (short_path / "nvme" / "segments").iterdir():
            content = path.read_bytes()
            at = content.find(needle)
            if at >= 0:
                with path.open("r+b") as file:
                    file.seek(at + 100)
                    file.write(bytes(64))
                damaged += 1
        assert damaged == 1
        engine.array[20:40] = 0xA5
        load = engine.kv.load(chain("a", 12), range(24, 36))
        result = load.result()
        assert (result.blocks, result.reason) == (7, Reason.CORRUPT)
        assert np.array_equal(engine.array[24:31], kept[:7])
        assert (engine.array[31:36] == 0xA5).all(), "nothing of a damaged block, or of those behind it"


def test_draining_waits_for_copies(make_daemon_thread: MakeDaemonThread, gpu: FakeGpu) -> None:
    daemon = make_daemon_thread(driver=gpu.driver, drain_s=10.0)
    with Engine(gpu, daemon) as engine:
        engine.kv.save(chain("a", 4), range(4))
        with gpu.held():
            load = engine.kv.load(chain("a", 4), range(8, 12))
            draining = threading.Thread(target=daemon.drain)
            draining.start()
            eventually(lambda: engine.kv.load(chain("a", 4), range(12, 16)).reason is Reason.DRAINING)
            assert draining.is_alive()
            assert not daemon.store.is_idle
        draining.join(10.0)
        assert not draining.is_alive()
        assert load.result().blocks == 4


def test_progress_words_are_handed_to_their_instance_only(make_daemon_thread: MakeDaemonThread, gpu: FakeGpu) -> None:
    daemon = make_daemon_thread(driver=gpu.driver)
    with Engine(gpu, daemon) as engine, Engine(gpu, daemon, seed=1) as other:
        mine = engine.kv._ipc._registration_id if engine.kv._ipc else 0
        with pytest.raises(kv.LeaseUnknown, match="not of this attachment"):
            other.client.link.device_progress(mine)
        # The socket goes on after a refusal.
        assert other.kv.save(chain("a", 1), [0]).saved == 1


def test_closing_returns_when_nothing_touches_the_cache(make_daemon_thread: MakeDaemonThread, gpu: FakeGpu) -> None:
    daemon = make_daemon_thread(driver=gpu.driver)
    with Engine(gpu, daemon) as engine:
        engine.kv.save(chain("a", 4), range(4))
        with gpu.held():
            load = engine.kv.load(chain("a", 4), range(8, 12))
            eventually(lambda: gpu.queued_copies >= 2)
            closing = threading.Thread(target=engine.kv.close)
            closing.start()
            assert gpu.opened
            closing.join(0.3)
            assert closing.is_alive(), "copies are under way"
        closing.join(10.0)
        assert not gpu.opened
        assert load.result().blocks == 4


def test_a_put_whose_registration_is_closed_meanwhile_reserves_nothing(
    make_daemon_thread: MakeDaemonThread, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon_thread(driver=gpu.driver)
    with Engine(gpu, daemon) as engine:
        copies = daemon.store.device_copies
        require = copies.require_places

        def close_after_the_check(*arguments: object, **named: object) -> object:
            places = require(*arguments, **named)  # type: ignore[arg-type]
            places.registration.is_closed = True
            return places

        monkeypatch.setattr(copies, "require_places", close_after_the_check)
        result = engine.kv.save(chain("a", 2), [0, 1])
        assert (result.saved, result.refused) == (0, 2)
        assert daemon.holds() == (0, 0, 0)
        monkeypatch.undo()
        assert engine.client.save(chain("a", 2), bytearray(2 * BLOCK)).saved == 2


def test_a_session_that_was_truncated_is_not_loaded_with_keys_at_their_old_positions(
    make_daemon_thread: MakeDaemonThread, gpu: FakeGpu
) -> None:
    daemon = make_daemon_thread(driver=gpu.driver)
    with Engine(gpu, daemon) as engine:
        engine.kv.save(chain("a", 8), range(8), session_id="s")
        link = engine.client.link
        moved = chain("a truncated", 4)
        truncated = link.call(
            "Truncate",
            pb.TruncateRequest(namespace_id=1, session_id="s", drop_ratio=0.5, hashes=b"".join(moved)),
            5.0,
        )
        assert truncated.held_blocks == 4
        # This plane rotates no keys, so blocks that moved are misses for it.
        load = engine.kv.load(moved, range(10, 14), session_id="s")
        assert load.result().blocks == 0
        assert engine.kv.load(chain("a", 8), range(10, 18)).result().blocks == 8
