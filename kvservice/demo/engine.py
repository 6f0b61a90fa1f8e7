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
from kvservice_adapters.serving import Request, Result, ServingLoop
from kvservice_adapters.transformers import (
    AdapterOptions,
    DrainOutcome,
    KVRows,
    PrefixLoad,
    TrackedSequence,
    TransformersAdapter,
    serve_model,
)
from kvservice_adapters.transformers.paths import RowsFor
from kvservice_adapters.truncation import TruncationPolicy

TOKENS_PER_BLOCK = 16


class WatchedAdapter(TransformersAdapter):
    """An adapter that notes where blocks were, and can harm what it loads (control, sabotage)."""

    def __init__(self, *arguments: Any, sabotage: str, **more: Any) -> None:
        """`sabotage`: "lose-blocks", "corrupt-blocks" or ""; all else is the adapter's."""
        super().__init__(*arguments, **more)
        self.control_armed = False
        self._sabotage = sabotage
        self._origins: dict[str, tuple[int, int]] = {}

    def begin(self, sequence: TrackedSequence, rows_for: RowsFor) -> PrefixLoad:
        """As ever; but nothing where blocks are to be lost, and in the control the sign of every number is flipped."""
        if self._sabotage == "lose-blocks":
            return super().begin(self.track(sequence.chain.tokens[:1]), rows_for)  # too short to be held
        given: list[KVRows] = []

        def noted(blocks: int) -> KVRows:
            given.append(rows_for(blocks))
            return given[0]

        load = super().begin(sequence, noted)
        blocks = load.tokens // TOKENS_PER_BLOCK
        self._origins[sequence.request_id] = (load.dram_blocks, blocks - load.dram_blocks)
        if load.tokens and (self.control_armed or self._sabotage == "corrupt-blocks"):
            load.finish()  # all of it is there, so that nothing arrives behind this
            for keys, values in given[0]:
                keys[:, : load.tokens].neg_()
                values[:, : load.tokens].neg_()
        return load

    def store(self, sequence: TrackedSequence, rows: KVRows, *, length_tokens: int) -> None:
        """As ever; but nothing of the nonsense that the control makes the engine compute."""
        if not self.control_armed:
            super().store(sequence, rows, length_tokens=length_tokens)

    def update_queue(
        self, waiting: Sequence[kvservice_client.WaitingRequest], *, started: Collection[str] = ()
    ) -> None:
        """Not passed on: the demo shows which tier blocks come from, and look-ahead would have fetched them all."""

    def origin(self, request_id: str) -> tuple[int, int]:
        """How many of the blocks that a request loaded were in DRAM, and how many on NVMe, when it asked; once."""
        return self._origins.pop(request_id, (0, 0))


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
        self._adapter: WatchedAdapter | None = None
        if arguments.socket_dir:
            self._adapter = WatchedAdapter(
                self._model,
                arguments.socket_dir,
                sabotage=arguments.sabotage,
                tokens_per_block=TOKENS_PER_BLOCK,
                weights_identity=arguments.weights_identity,
                instance_name=arguments.name,
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
            attached=self._adapter is not None and self._adapter.attached,
            plane=str(self._adapter.plane) if self._adapter else "",
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
        if self._adapter:
            self._adapter.close()

    def _step(self) -> None:
        report = self._loop.step()
        for first in report.first_tokens:
            self.emit(FirstToken(first.request_id, first.ttft_s))
        for result in report.finished:
            origin = self._adapter.origin(result.request_id) if self._adapter else (0, 0)
            self.emit(_finished(result, *origin))

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, MakeUserTurns):
            self.emit(self._user_turns(command))
        elif isinstance(command, Drain):
            outcome = self._loop.drain(command.timeout_s)
            stats = dataclasses.asdict(self._adapter.stats()) if self._adapter else {}
            self.emit(Drained(in_time=outcome is DrainOutcome.DRAINED, stats=stats))
        elif isinstance(command, CorruptLoads):
            if self._adapter is None:
                self.emit(Failed("this engine runs without the service: nothing is loaded that could be corrupted"))
            else:
                self._adapter.control_armed = command.armed
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
