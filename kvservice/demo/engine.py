"""engine: one engine process of the demo: the serving loop on a local model, driven by lines on stdin.

stdout carries the protocol and nothing else; everything a library prints goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, TextIO

import torch
import transformers

import kvservice_client
from kvservice.demo.protocol import (
    Command,
    CorruptLoads,
    Done,
    Drain,
    Drained,
    Event,
    Failed,
    Finished,
    FirstToken,
    Generate,
    MakeUserTurns,
    Quit,
    Ready,
    UserTurns,
    decode_command,
    encode,
    encode_logits,
)
from kvservice.demo.user_turns import make_turns
from kvservice_adapters.service import KVClient
from kvservice_adapters.serving import Request, Result, ServingLoop
from kvservice_adapters.transformers import AdapterOptions, DrainOutcome, ServedModel, TransformersAdapter, serve_model
from kvservice_adapters.truncation import TruncationPolicy

TOKENS_PER_BLOCK = 16


class FaultyClient:
    """A client in front of the real one: it notes where blocks were, and can harm what passes (control, sabotage)."""

    def __init__(self, client: KVClient, served: ServedModel, sabotage: str) -> None:
        self._client = client
        self._served = served
        self._sabotage = sabotage
        self.control_armed = False
        self._dram_blocks = 0  # of the latest lookup
        self._origins: dict[str, tuple[int, int]] = {}

    @property
    def attached(self) -> bool:
        """False while the control makes the engine compute nonsense: the adapter then saves nothing of it."""
        return self._client.attached and not self.control_armed

    def plan_load(self, hashes: Sequence[bytes], *, prefill_tokens_per_s: float = 0.0) -> kvservice_client.LoadPlan:
        """As the service says, or nothing where blocks are to be lost."""
        plan = self._client.plan_load(hashes, prefill_tokens_per_s=prefill_tokens_per_s)
        self._dram_blocks = plan.dram_blocks
        if self._sabotage == "lose-blocks":
            return kvservice_client.LoadPlan(reason=kvservice_client.Reason.NOT_HELD)
        return plan

    def update_queue(
        self, waiting: Sequence[kvservice_client.WaitingRequest], *, started: Collection[str] = ()
    ) -> None:
        """Not passed on: the demo shows which tier blocks come from, and look-ahead would have fetched them all."""

    def load(
        self,
        hashes: Sequence[bytes],
        destination: Any,
        *,
        session_id: str = "",
        request_id: str = "",
        wait_s: float = 0.0,
        deadline_s: float = 10.0,
        accepts_shifts: bool = False,
    ) -> kvservice_client.LoadResult:
        """As the service does; in the control, the sign of every number is flipped afterwards."""
        done = self._client.load(
            hashes,
            destination,
            session_id=session_id,
            request_id=request_id,
            wait_s=wait_s,
            deadline_s=deadline_s,
            accepts_shifts=accepts_shifts,
        )
        in_dram = min(done.blocks, self._dram_blocks)
        self._origins[request_id] = (in_dram, done.blocks - in_dram)
        if self.control_armed or self._sabotage == "corrupt-blocks":
            layout = self._served.layout
            layout.as_blocks(destination[: done.blocks * layout.block_size_bytes]).neg_()
        return done

    def truncate(
        self,
        session_id: str,
        hashes: Sequence[bytes],
        *,
        source: Sequence[bytes] = (),
        keep: Sequence[tuple[int, int]] = (),
    ) -> kvservice_client.TruncateResult:
        """As the service does."""
        return self._client.truncate(session_id, hashes, source=source, keep=keep)

    def save(
        self,
        hashes: Sequence[bytes],
        source: Any,
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        deadline_s: float = 10.0,
    ) -> kvservice_client.SaveResult:
        """As the service does."""
        return self._client.save(
            hashes, source, parent=parent, session_id=session_id, request_id=request_id, deadline_s=deadline_s
        )

    def origin(self, request_id: str) -> tuple[int, int]:
        """How many of the blocks that a request loaded were in DRAM, and how many on NVMe, when it asked; once."""
        return self._origins.pop(request_id, (0, 0))

    def close(self) -> None:
        """Detach the real client."""
        self._client.close()


class Engine:
    """Model, adapter and loop, and what each command does with them."""

    def __init__(self, arguments: argparse.Namespace, output: TextIO) -> None:
        self._output = output
        self._output_lock = threading.Lock()
        self._model_path: str = arguments.model
        dtype = getattr(torch, arguments.dtype)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        self._model.to(arguments.device).eval()
        self._served = serve_model(
            self._model, tokens_per_block=TOKENS_PER_BLOCK, weights_identity=arguments.weights_identity
        )
        truncation = None
        if arguments.truncate:
            truncation = TruncationPolicy(arguments.window_tokens, tokens_per_block=TOKENS_PER_BLOCK)
        self._client: FaultyClient | None = None
        self._adapter: TransformersAdapter | None = None
        if arguments.socket_dir:
            real = kvservice_client.attach(
                self._served.namespace, socket_dir=arguments.socket_dir, instance_name=arguments.name
            )
            self._client = FaultyClient(real, self._served, arguments.sabotage)
            self._adapter = TransformersAdapter(
                self._model,
                self._client,
                tokens_per_block=TOKENS_PER_BLOCK,
                weights_identity=arguments.weights_identity,
                # What it shows is what resumes. A disk may well be slower than so small a model.
                options=AdapterOptions(recompute_if_faster=False),
                truncation=truncation,
            )
        self._loop = ServingLoop(
            self._model,
            self._adapter,
            rows=arguments.rows,
            window_tokens=arguments.window_tokens,
            truncation=truncation,
        )
        self._loop.warm_up()

    def ready(self) -> Ready:
        """What this engine is."""
        return Ready(
            process_id=os.getpid(),
            model=self._model_path,
            dtype=str(self._served.layout.dtype).removeprefix("torch."),
            device=str(self._served.device),
            layers=self._served.layout.layers,
            vocabulary=int(self._model.config.vocab_size),
            block_size_bytes=self._served.layout.block_size_bytes,
            tokens_per_block=TOKENS_PER_BLOCK,
            attached=self._client is not None and self._client.attached,
        )

    def emit(self, event: Event) -> None:
        """Write one event."""
        with self._output_lock:
            self._output.write(encode(event) + "\n")
            self._output.flush()

    def submit(self, command: Generate) -> None:
        """Queue a turn; called by the reading thread, so that the time to the first token counts from its arrival."""
        try:
            self._loop.submit(
                Request(
                    request_id=command.request_id,
                    session_id=command.session_id,
                    tokens=tuple(command.tokens),
                    history_tokens=command.history_tokens,
                    max_new_tokens=command.max_new_tokens,
                )
            )
        except (ValueError, RuntimeError) as error:
            self.emit(Failed(f"{command.request_id}: {error}"))

    def serve(self, inbox: queue.SimpleQueue[Command]) -> None:
        """Run until told to quit."""
        while True:
            idle = not (self._loop.waiting or self._loop.running)
            try:
                command = inbox.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            if isinstance(command, Quit):
                break
            self._carry_out(command)
        if self._adapter and self._client:
            self._adapter.close()
            self._client.close()

    def _step(self) -> None:
        report = self._loop.step()
        for first in report.first_tokens:
            self.emit(FirstToken(first.request_id, first.ttft_s))
        for result in report.finished:
            origin = self._client.origin(result.request_id) if self._client else (0, 0)
            self.emit(_finished(result, *origin))

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, MakeUserTurns):
            self.emit(self._user_turns(command))
        elif isinstance(command, Drain):
            outcome = self._loop.drain(command.timeout_s)
            stats = dataclasses.asdict(self._adapter.stats()) if self._adapter else {}
            self.emit(Drained(in_time=outcome is DrainOutcome.DRAINED, stats=stats))
        elif isinstance(command, CorruptLoads):
            if self._client is None:
                self.emit(Failed("this engine runs without the service: nothing is loaded that could be corrupted"))
            else:
                self._client.control_armed = command.armed
                self.emit(Done())

    def _user_turns(self, command: MakeUserTurns) -> UserTurns:
        lengths = [command.first_turn_tokens] + [command.next_turn_tokens] * (command.turns - 1)
        tokenize = _tokenizer_of(self._model_path)
        turns = make_turns(
            lengths, command.conversations, vocabulary=int(self._model.config.vocab_size), tokenize=tokenize
        )
        return UserTurns(tokens=turns, from_tokenizer=tokenize is not None)


def _finished(result: Result, dram_blocks: int, nvme_blocks: int) -> Finished:
    return Finished(
        request_id=result.request_id,
        tokens=list(result.tokens),
        prompt_tokens=result.prompt_tokens,
        dropped_tokens=result.dropped_tokens,
        reused_tokens=result.reused_tokens,
        computed_tokens=result.computed_tokens,
        dram_blocks=dram_blocks,
        nvme_blocks=nvme_blocks,
        ttft_s=result.ttft_s,
        logits_base64=encode_logits(result.prompt_logits.numpy()),
    )


def _tokenizer_of(model_path: str) -> Callable[[str], list[int]] | None:
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError, KeyError):
        return None  # a model without a tokenizer: random ids will do
    return lambda text: [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def _read_commands(engine: Engine, inbox: queue.SimpleQueue[Command]) -> None:
    # The end of stdin means that the demo is gone: then this process has no reason to live on.
    for line in sys.stdin:
        command = decode_command(line)
        if isinstance(command, Generate):
            engine.submit(command)
        inbox.put(command)
    inbox.put(Quit())


def _protocol_output() -> TextIO:
    # Whatever prints to stdout, in Python or below, reaches stderr from here on.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


def main(argv: Sequence[str]) -> int:
    """Run an engine process until stdin ends or it is told to quit."""
    output = _protocol_output()
    parser = argparse.ArgumentParser(prog="python -m kvservice.demo.engine")
    parser.add_argument("--model", required=True, help="folder of a local model")
    parser.add_argument("--weights-identity", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--socket-dir", default="", help="the daemon's socket folder; empty: no service")
    parser.add_argument("--name", default="demo engine")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--window-tokens", type=int, default=4096)
    parser.add_argument("--truncate", action="store_true", help="cut conversations that outgrow the window")
    parser.add_argument("--sabotage", default="", choices=("", "lose-blocks", "corrupt-blocks"))
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    engine = Engine(arguments, output)
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(engine, inbox), daemon=True).start()
    engine.emit(engine.ready())
    engine.serve(inbox)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
