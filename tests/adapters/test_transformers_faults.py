"""The transformers adapter where things go wrong: no daemon, a daemon that dies, calls that must not be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvservice_client as kv
from kvservice_adapters.transformers import AdapterOptions, serve_model
from tests.adapters.clients import PassingClient
from tests.adapters.generating import (
    REUSABLE_BLOCKS,
    REUSABLE_TOKENS,
    SAVED_BLOCKS,
    TIMEOUT_S,
    TOKENS_PER_BLOCK,
    WEIGHTS,
    adapter_on,
    attach,
    generate,
    prompt,
    run_and_save,
)
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]


class KillsDaemon(PassingClient):
    """A client that kills the daemon after a lookup, before the load that follows it."""

    def __init__(self, client: kv.Client, daemon: DaemonProcess) -> None:
        super().__init__(client)
        self._daemon = daemon

    def plan_load(self, hashes: Sequence[bytes], **more: Any) -> kv.LoadPlan:
        found = super().plan_load(hashes, **more)
        self._daemon.kill()
        return found


def test_an_absent_daemon_costs_the_reuse_and_nothing_else(
    model: PreTrainedModel, salt: str, absent_daemon: DaemonProcess
) -> None:
    ids = prompt()
    recomputed = generate(model, ids)
    with (
        attach(model, absent_daemon.socket_dir, salt, timeout_s=0.0) as client,
        adapter_on(model, client, salt) as adapter,
    ):
        output, cache = run_and_save(adapter, model, ids)
        assert torch.equal(output, recomputed)
        assert cache.reused_tokens == 0
        assert adapter.stats().missed_blocks == {"UNAVAILABLE": REUSABLE_BLOCKS}
        assert adapter.stats().skipped_blocks == {"UNAVAILABLE": SAVED_BLOCKS}
        absent_daemon.start()
        assert client.wait_attached(TIMEOUT_S), "the client did not attach to the daemon that came up"
        run_and_save(adapter, model, ids)
        assert adapter.load(ids).reused_tokens == REUSABLE_TOKENS


def test_a_daemon_that_dies_between_lookup_and_load_is_a_miss_and_its_successor_is_used(
    model: PreTrainedModel, salt: str, daemon: DaemonProcess
) -> None:
    ids = prompt()
    with attach(model, daemon.socket_dir, salt) as client:
        with adapter_on(model, client, salt) as adapter:
            recomputed, _ = run_and_save(adapter, model, ids)
        with adapter_on(model, KillsDaemon(client, daemon), salt) as adapter:
            cache = adapter.load(ids)
            assert cache.reused_tokens == 0
            assert sum(adapter.stats().missed_blocks.values()) == REUSABLE_BLOCKS
            assert sum(adapter.stats().failed_loads.values()) == 1
            assert torch.equal(generate(model, ids, cache), recomputed)
        daemon.restart()
        assert client.wait_attached(TIMEOUT_S), "the client did not attach to the new daemon"
        with adapter_on(model, client, salt) as adapter:
            output, cache = run_and_save(adapter, model, ids)
            assert (cache.reused_tokens, adapter.stats().saved_blocks) == (0, SAVED_BLOCKS), "its DRAM was empty"
            assert torch.equal(output, recomputed)
            assert adapter.load(ids).reused_tokens == REUSABLE_TOKENS


def test_a_padded_prompt_is_refused(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with adapter_on(model, socket_dir, salt) as adapter:
        cache = adapter.load(ids)
        with pytest.raises(ValueError, match="without padding"):
            model.generate(  # type: ignore[operator]
                ids, past_key_values=cache, attention_mask=mask, max_new_tokens=2, pad_token_id=0
            )


def test_several_sequences_in_one_cache_are_refused(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    with adapter_on(model, socket_dir, salt) as adapter:
        with pytest.raises(ValueError, match="one sequence"):
            adapter.load(torch.zeros(2, 40, dtype=torch.long))
        with pytest.raises(ValueError, match="no token"):
            adapter.load([])
        ids = prompt()
        cache = adapter.load(ids)
        output = generate(model, ids, cache)
        with pytest.raises(ValueError, match="do not begin with"):
            adapter.save(output[:, 1:], cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="2 sequences"):
            adapter.save(output, cache)
        assert adapter.stats().saved_blocks == 0


def test_a_full_save_queue_leaves_blocks_unsaved_and_says_so(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    ids = prompt()
    block_size_bytes = serve_model(model, weights_identity=WEIGHTS).layout.block_size_bytes
    options = AdapterOptions(save_queue_size_bytes=4 * block_size_bytes)
    with adapter_on(model, socket_dir, salt, options) as adapter:
        run_and_save(adapter, model, ids)
        stats = adapter.stats()
        assert (stats.saved_blocks, stats.skipped_blocks) == (4, {"QUEUE_FULL": 16})
        assert adapter.load(ids).reused_tokens == 4 * TOKENS_PER_BLOCK
