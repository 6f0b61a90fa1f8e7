"""The vLLM adapter and what happens to requests: preemption, aborts, priorities, LoRA: nothing leaks or differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.vllm_server import transfer_config
from tests.adapters.conftest import TINY
from tests.adapters.vllm_engine import VllmEngine
from tests.adapters.vllm_scenes import HELD_TOKENS, PROMPT_TOKENS, TAIL_TOKENS, answer, computed_before, prompt
from tests.commands import CommandFailed
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]


def test_preempted_requests_resume_from_the_store_and_answer_the_same(
    vllm: VllmEngine, model_dir: Path, daemon: DaemonProcess
) -> None:
    prompts = [prompt(seed, tokens=200) for seed in range(4)]
    vllm.open(model_dir)
    expected = [outcome["tokens"] for outcome in vllm.generate(*prompts, tokens=160)]
    vllm.do("close")
    # 360 tokens are 12 blocks; four requests want 48.
    tight = {"num_gpu_blocks_override": 32, "max_model_len": 512}
    vllm.open_attached(model_dir, daemon, **tight)
    free = vllm.do("free_blocks")
    outcomes = vllm.generate(*prompts, tokens=160)
    vllm.do("settle")
    assert vllm.do("preempted") > 0, "nothing was preempted: this tests nothing"
    assert [outcome["tokens"] for outcome in outcomes] == expected
    assert vllm.do("counts").get("loaded_blocks", 0) > 0
    assert vllm.do("free_blocks") == free
    # What was saved around preemptions is right as well.
    vllm.do("drop_cache")
    for ids, tokens in zip(prompts, expected, strict=True):
        again = answer(vllm, ids, tokens=160)
        assert (again["tokens"], again["cached"]) == (tokens, 192)
        vllm.do("drop_cache")


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_gives_every_block_back(served: VllmEngine, steps: int) -> None:
    ids = prompt(20 + steps)
    expected = computed_before(served, ids)
    free = served.do("free_blocks")
    served.do("abort", prompt=ids, steps=steps)  # before, while and after its blocks are loaded
    served.do("abort", prompt=prompt(30 + steps), steps=steps)  # while they are saved
    served.do("settle")
    assert served.do("free_blocks") == free
    assert answer(served, ids)["tokens"] == expected


def test_the_view_of_the_queue_is_in_the_order_of_the_engine(served: VllmEngine) -> None:
    prompts = [prompt(40 + seed, tokens=40) for seed in range(3)]
    assert served.do("waiting_order", prompts=prompts, priorities=[2, 0, 1]) == ["w1", "w2", "w0"]
    assert served.do("waiting_order", prompts=prompts, priorities=[0, 0, 0]) == ["w0", "w1", "w2"]
    served.do("settle")
    outcomes = served.generate(*[prompt(43 + seed) for seed in range(3)], priorities=[2, 0, 1])
    assert {outcome["computed"] for outcome in outcomes} == {PROMPT_TOKENS}


def test_the_session_reaches_the_daemon(served: VllmEngine) -> None:
    before = served.do("sessions")
    answer(served, prompt(50))
    assert served.do("sessions") == before
    for _ in range(2):
        answer(served, prompt(51), params={"session_id": "conversation 7"})
    assert served.do("sessions") == before + 1


def write_lora(folder: Path, *, seed: int) -> None:
    """A LoRA on the queries and keys of the tiny model."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    rank = 8
    tensors = {}
    for layer in range(TINY.layers):
        for name, rows in (("q_proj", TINY.heads * TINY.head_dim), ("k_proj", TINY.kv_heads * TINY.head_dim)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = random.standard_normal((rank, TINY.hidden), dtype=np.float32) * 0.3
            tensors[f"{place}.lora_B.weight"] = random.standard_normal((rows, rank), dtype=np.float32) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "k_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_a_lora_has_blocks_of_its_own_even_where_its_files_change(
    vllm: VllmEngine, model_dir: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    ids = prompt()
    folder = tmp_path / "lora"
    write_lora(folder, seed=1)
    engine = {"enable_lora": True, "max_lora_rank": 8}
    vllm.open_attached(model_dir, daemon, **engine)
    plain = answer(vllm, ids)
    first = answer(vllm, ids, lora=str(folder))
    assert first["computed"] == PROMPT_TOKENS
    assert first["tokens"] != plain["tokens"]
    vllm.do("drop_cache")
    again = answer(vllm, ids, lora=str(folder))
    assert (again["tokens"], again["computed"]) == (first["tokens"], TAIL_TOKENS)
    vllm.do("close")
    write_lora(folder, seed=2)
    vllm.open_attached(model_dir, daemon, **engine)
    changed = answer(vllm, ids, lora=str(folder))
    assert changed["computed"] == PROMPT_TOKENS
    assert changed["tokens"] != first["tokens"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kv_load_failure_policy": "fail"}, "kv_load_failure_policy"),
        ({"kv_connector_extra_config": {"socketdir": "/x"}}, "socketdir"),
        ({"kv_connector_extra_config": {"lookup_wait_s": "soon"}}, "lookup_wait_s"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_start(
    vllm: VllmEngine, model_dir: Path, change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(CommandFailed, match=complaint):
        vllm.open(model_dir, kv_transfer_config=transfer_config() | change)


def test_a_producer_only_saves_and_a_consumer_only_loads(
    vllm: VllmEngine, model_dir: Path, daemon: DaemonProcess
) -> None:
    def run(role: str, ids: list[int]) -> int:
        config = transfer_config(socket_dir=daemon.socket_dir) | {"kv_role": role}
        vllm.open(model_dir, kv_transfer_config=config)
        outcome = answer(vllm, ids)
        vllm.do("close")
        return int(outcome["cached"])

    ids = prompt()
    assert [run("kv_consumer", ids), run("kv_consumer", ids)] == [0, 0]
    assert [run("kv_producer", ids), run("kv_producer", ids)] == [0, 0]
    assert run("kv_consumer", ids) == HELD_TOKENS
