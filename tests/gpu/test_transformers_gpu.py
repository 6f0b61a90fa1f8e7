"""The transformers adapter on a GPU: prefixes arrive layer by layer through the buffer, or are computed after all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvservice.demo.model import ModelShape, write_model
from tests.daemons import DaemonProcess
from tests.engines import EngineProcess
from tests.gpu.conftest import MakeGpuEngine
from tests.waiting import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SHAPE = ModelShape(
    layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocabulary=512, window_tokens=8192
)
# 2 MiB of keys and values for each block: a load takes long enough to be interrupted.
LARGE = ModelShape(
    layers=16, hidden=256, intermediate=512, heads=8, kv_heads=8, head_dim=128, vocabulary=512, window_tokens=8192
)
BLOCK_TOKENS, NEW_TOKENS = 16, 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SHAPE)
    return folder


@pytest.fixture(scope="module")
def large_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large-model")
    write_model(folder, LARGE)
    return folder


def draw(seed: int, tokens: int) -> list[int]:
    numbers = random.Random(seed)  # no secret
    return [numbers.randrange(512) for _ in range(tokens)]


def opened(
    make_engine: MakeGpuEngine, daemon: DaemonProcess, model_dir: Path, dtype: str = "bfloat16", **more: int
) -> EngineProcess:
    engine = make_engine("transformers_engine.py")
    engine.do("open", model_dir=str(model_dir), socket_dir=daemon.socket_dir, dtype=dtype, **more)
    return engine


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_turn_gives_the_tokens_of_a_cache_that_never_left_the_gpu(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, model_dir: Path, dtype: str
) -> None:
    engine = opened(make_engine, daemon, model_dir, dtype)
    assert engine.do("plane") == "cuda-ipc"
    tokens: list[int] = []
    for turn in range(5):
        history = len(tokens)
        tokens += draw(turn, 100 + 37 * turn)
        result = engine.do("turn", session="s", tokens=tokens, new_tokens=NEW_TOKENS)
        assert (result["same_tokens"], result["same_history"]) == (True, True), turn
        # The last token of an answer is not in the cache.
        assert result["reused"] == max(0, history - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert result["layer_wise"] is (turn > 0)
        assert result["computed"] == len(tokens) - result["reused"]
        tokens += result["tokens"]
        assert engine.do("drain")
    stats = engine.do("stats")
    assert (stats["failed_loads"], stats["unsaved_blocks"], stats["skipped_blocks"]) == ({}, {}, {})
    assert not daemon.errors


def test_another_process_resumes_what_one_saved(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, model_dir: Path
) -> None:
    one, other = opened(make_engine, daemon, model_dir), opened(make_engine, daemon, model_dir)
    first = draw(0, 500)
    tokens = first + one.do("turn", session="s", tokens=first)["tokens"] + draw(1, 60)
    assert one.do("drain")
    resumed = other.do("resume", session="s", tokens=tokens)
    kept = one.do("turn", session="s", tokens=tokens)
    assert kept["same_tokens"]
    assert resumed == {"tokens": kept["tokens"], "reused": kept["reused"]}
    assert resumed["reused"] >= len(first)


def test_a_client_that_is_not_the_librarys_takes_the_hosts_path(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, model_dir: Path
) -> None:
    engine = opened(make_engine, daemon, model_dir, own_client=1)
    assert engine.do("plane") == "shared-memory (the client is not the library's own)"
    first = draw(0, 500)
    tokens = first + engine.do("turn", session="s", tokens=first)["tokens"] + draw(1, 60)
    assert engine.do("drain")
    result = engine.do("turn", session="s", tokens=tokens)
    assert (result["same_tokens"], result["same_history"], result["layer_wise"]) == (True, True, False)
    assert result["reused"] >= len(first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_conversations_that_overflow_go_on_with_turned_keys(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, model_dir: Path, dtype: str
) -> None:
    engine = opened(make_engine, daemon, model_dir, dtype, window_tokens=256)
    tokens: list[int] = []
    overflows = set()
    for turn in range(14):
        tokens += draw(turn, 40)
        result = engine.do("turn", session="s", tokens=tokens)
        assert (result["same_tokens"], result["same_history"]) == (True, True), result
        assert result["computed"] <= 40 + 1 + BLOCK_TOKENS
        overflows.add(result["dropped"])
        tokens += result["tokens"]
        assert engine.do("drain")
    assert len(overflows) > 3
    stats = engine.do("stats")
    assert stats["shifted_blocks"] > 20
    assert stats["failed_loads"] == {}
    assert not daemon.errors


def test_prompts_larger_than_the_buffer_are_saved_and_loaded(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, model_dir: Path
) -> None:
    block_bytes = SHAPE.layers * 2 * SHAPE.kv_heads * BLOCK_TOKENS * SHAPE.head_dim * 2
    engine = opened(make_engine, daemon, model_dir, buffer_bytes=8 * block_bytes)
    tokens = draw(0, 600)
    # In pieces of a buffer each: what is not saved yet is offered again with the next turn.
    for _ in range(12):
        result = engine.do("turn", session="s", tokens=tokens)
        assert (result["same_tokens"], result["same_history"]) == (True, True)
        assert engine.do("drain")
        if result["reused"] == 592:
            break
    else:
        pytest.fail(f"{result['reused']} of 592 tokens are saved")
    assert engine.do("stats")["failed_loads"] == {}


def test_a_daemon_killed_in_the_middle_of_a_load_changes_no_token(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, large_model_dir: Path
) -> None:
    engine = opened(make_engine, daemon, large_model_dir, "float32")
    tokens = draw(0, 4000)
    expected = engine.do("turn", session="s", tokens=tokens)["tokens"]
    for attempt in range(4):
        assert engine.do("drain")
        killed = engine.do("turn", session=f"killed {attempt}", tokens=tokens, kill=daemon.process.pid)
        assert killed["tokens"] == expected
        daemon.wait()
        daemon.restart()
        eventually(lambda: engine.do("attached"))
        assert engine.do("turn", session=f"saved {attempt}", tokens=tokens)["tokens"] == expected
    assert engine.do("drain")
    resumed = engine.do("resume", session="s", tokens=tokens)
    assert resumed["reused"] > 3900
    assert resumed["tokens"] == expected


def test_the_loop_loads_what_waits_ahead_and_gives_the_same_tokens(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, model_dir: Path
) -> None:
    engine = opened(make_engine, daemon, model_dir, "float32")
    prompts: dict[str, list[int]] = {f"s{number}": [] for number in range(6)}
    for turn in range(3):
        histories = {name: len(tokens) for name, tokens in prompts.items()}
        for number, name in enumerate(prompts):
            prompts[name] = prompts[name] + draw(100 * turn + number, 90 + 11 * number)
        recomputed = engine.do("serve", prompts=prompts, with_service=False)
        served = engine.do("serve", prompts=prompts, with_service=True)
        for name, result in served.items():
            assert result["tokens"] == recomputed[name]["tokens"], (turn, name)
            assert result["reused"] == max(0, histories[name] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert result["computed"] == len(prompts[name]) - result["reused"]
            prompts[name] = prompts[name] + result["tokens"]
    stats = engine.do("stats")
    assert stats["ahead_blocks"] > 0
    assert (stats["failed_loads"], stats["unsaved_blocks"], stats["skipped_blocks"]) == ({}, {}, {})
    assert not daemon.errors
