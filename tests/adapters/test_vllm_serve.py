"""`vllm serve` with the adapter, as people run it: chat completions, sessions, metrics, a dying daemon, two ranks."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvservice_client as kv
from benchmarks.chat_model import write_chat_model
from benchmarks.multi_turn import Load, Server, drive, generated
from benchmarks.vllm_server import VllmServer, transfer_config
from kvservice_adapters.truncation import TruncationPolicy
from tests.adapters.conftest import KNOBS, TINY
from tests.adapters.vllm_engine import PATIENT
from tests.adapters.vllm_scenes import prompt
from tests.daemons import DaemonProcess
from tests.waiting import eventually

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(600)]

ATTACHED_WITHIN_S = 30.0
FLAGS = ("--dtype", "float32", "--max-model-len", "2048")
# Too few blocks for two conversations: what is reused comes from the store.
SMALL_CACHE = ("--num-gpu-blocks-override", "66", "--max-num-seqs", "4")
TWO_RANKS = {"VLLM_CPU_SIM_MULTI_NUMA": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-model")
    write_chat_model(folder, TINY)
    return folder


def serve(model: Path, daemon: DaemonProcess, log: Path, *flags: str, **environ: str) -> VllmServer:
    """A server on its way; "with" it."""
    transfer = transfer_config(socket_dir=daemon.socket_dir, **PATIENT)
    return VllmServer(model, transfer=transfer, flags=(*FLAGS, *flags), log=log, environ=environ)


def ask(server: VllmServer, path: str, **body: Any) -> dict[str, Any]:
    """The API's answer to a greedy request for 24 tokens."""
    usual = {"model": "model", "max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/{path}", json.dumps(usual | body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answered: dict[str, Any] = json.load(response)
    return answered


def chat(server: VllmServer, text: str, **more: Any) -> tuple[str, int, int]:
    """The answer, and how many tokens of the prompt there were and were not computed."""
    answered = ask(server, "chat/completions", messages=[{"role": "user", "content": text}], **more)
    usage = answered["usage"]
    return answered["choices"][0]["message"]["content"], usage["prompt_tokens"], cached_of(usage)


def cached_of(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def metric(server: VllmServer, name: str) -> float:
    """The sum of vLLM's series of that name."""
    lines = server.get("/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "s", **KNOBS) as daemon:
        yield daemon


def test_conversations_over_the_api_outlive_the_server_and_the_daemon(
    vllm_installed: None, chat_model: Path, own_daemon: DaemonProcess, tmp_path: Path
) -> None:
    text = "What did the river say to the stone? " * 8
    with serve(chat_model, own_daemon, tmp_path / "first.log", *SMALL_CACHE) as server:
        server.wait_ready()
        expected, prompt_tokens, reused = chat(server, text, session_id="conversation 7")
        assert reused == 0
        # The last blocks are saved behind the answer.
        eventually(lambda: metric(server, "vllm:kvservice_saved_blocks_total") >= prompt_tokens // 32)
    with serve(chat_model, own_daemon, tmp_path / "second.log", *SMALL_CACHE) as server:
        server.wait_ready()
        again, _, reused = chat(server, text, session_id="conversation 7")
        assert (again, reused) == (expected, prompt_tokens // 32 * 32)
        assert metric(server, "vllm:kvservice_loaded_blocks_total") == prompt_tokens // 32
        assert metric(server, "vllm:external_prefix_cache_hits_total") == reused
        a_conversation_that_is_cut(server)
        conversations_without_a_daemon(server, own_daemon)
    log = (tmp_path / "second.log").read_text()
    assert log.count("no daemon answers") <= 2, "one line for each half, not one per request"
    assert "hook" not in log


def a_conversation_that_is_cut(server: VllmServer) -> None:
    """As docs/truncation.md says: tokens, the session, a salt, and what stays."""
    saved = metric(server, "vllm:kvservice_saved_blocks_total")
    conversation = prompt("cut", tokens=320)
    mine = {"cache_salt": "the secret of conversation 8", "kv_transfer_params": {"session_id": "conversation 8"}}
    answered = ask(server, "completions", prompt=conversation, return_token_ids=True, **mine)
    conversation += [*answered["choices"][0]["token_ids"], *prompt("next", tokens=20)]
    eventually(lambda: metric(server, "vllm:kvservice_saved_blocks_total") >= saved + 10)
    policy = TruncationPolicy(window_tokens=384, tokens_per_block=32, drop_ratio=1 / 3, sink_tokens=32)
    fitted = policy.fit(conversation, session_id="conversation 8", max_new_tokens=24)
    assert fitted.dropped_tokens == 128
    ids = list(fitted.tokens)
    mine["kv_transfer_params"] = {"session_id": "conversation 8", "truncation": fitted.stated()}
    answered = ask(server, "completions", prompt=ids, **mine)
    told = answered["kv_transfer_params"]["truncation"]
    assert told["reason"] == "ok"
    # The first 320 tokens were full blocks, and 128 of them are gone.
    assert told["held_tokens"] >= 320 - 128
    assert cached_of(answered["usage"]) == told["reused_tokens"] == told["held_tokens"]
    assert metric(server, "vllm:kvservice_shifted_blocks_total") == told["held_tokens"] // 32 - 1
    # Without its salt it is an ordinary request, and the answer says why.
    answered = ask(server, "completions", prompt=ids, kv_transfer_params=mine["kv_transfer_params"])
    told = answered["kv_transfer_params"]["truncation"]
    assert told["reason"] == "missing_salt"
    assert "cache_salt" in told["message"]
    assert cached_of(answered["usage"]) == 0


def conversations_without_a_daemon(server: VllmServer, daemon: DaemonProcess) -> None:
    """The daemon is killed while conversations are under way: none fails, and reuse comes back with it."""
    load = Load(generated(conversations=4, turns=4, first_words=60, words=6, seed=1), answer_tokens=16)
    reports = []
    driver = threading.Thread(target=lambda: reports.append(drive(Server(server.url), load)))
    before = metric(server, "vllm:request_success_total")
    driver.start()
    eventually(lambda: metric(server, "vllm:request_success_total") >= before + 3, within_s=60)
    daemon.kill()
    eventually(lambda: metric(server, "vllm:request_success_total") >= before + 6, within_s=60)
    daemon.restart()
    driver.join()
    (report,) = reports
    assert len(report.turns) == 16
    assert report.failed == []
    loaded = metric(server, "vllm:kvservice_loaded_blocks_total")

    def is_reused_again() -> bool:
        drive(Server(server.url), load)
        return metric(server, "vllm:kvservice_loaded_blocks_total") > loaded

    eventually(is_reused_again, within_s=ATTACHED_WITHIN_S)


def test_two_ranks_share_a_prompt_and_each_loads_its_own_heads(
    vllm_installed: None, chat_model: Path, own_daemon: DaemonProcess, tmp_path: Path
) -> None:
    text = "Two halves of every layer, one answer. " * 8
    flags = ("--tensor-parallel-size", "2", "--no-enable-prefix-caching")
    with serve(chat_model, own_daemon, tmp_path / "log", *flags, **TWO_RANKS) as server:
        server.wait_ready()
        expected, tokens, _ = chat(server, text)
        blocks = tokens // 32
        eventually(lambda: metric(server, "vllm:kvservice_saved_blocks_total") >= 2 * blocks)
        # A rank that the others' spinning kept from running for longer than its lease computes, and says so.
        for _ in range(5):
            loaded = metric(server, "vllm:kvservice_loaded_blocks_total")
            again, _, reused = chat(server, text)
            assert again == expected
            loaded = metric(server, "vllm:kvservice_loaded_blocks_total") - loaded
            if (loaded, reused) == (2 * blocks, blocks * 32):
                break
        else:
            counts = [line for line in server.get("/metrics").splitlines() if line.startswith("vllm:kvservice")]
            pytest.fail(f"{loaded} of {2 * blocks} blocks were loaded, {reused} tokens reused: {counts}")
        with kv.admin(socket_dir=own_daemon.socket_dir) as admin:
            places = {of.label[-7:]: of.block_size_bytes for of in admin.stats().namespaces}
    assert set(places) == {"tp0 pp0", "tp1 pp0"}
