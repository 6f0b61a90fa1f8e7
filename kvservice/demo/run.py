"""run: the demo from start to exit status: engines without a daemon, with one, restarted, and with it restarted too."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from kvservice.demo.checks import Control, Row, Summary, compare, judge_control, overflow_problems, summarise
from kvservice.demo.model import GPU_SHAPE, QUICK_SHAPE, ModelShape, write_model
from kvservice.demo.processes import DaemonProcess, DemoFailedError, EngineProcess
from kvservice.demo.protocol import CorruptLoads, Done, Finished, MakeUserTurns, Ready, UserTurns
from kvservice.demo.scenario import (
    ANSWER_TIMEOUT_S,
    ON_GPU,
    QUICK,
    Conversation,
    Scale,
    drain,
    run_one,
    run_turns,
)
from kvservice.demo.table import Progressing, made_console, table_of
from kvservice_adapters.hashing import weights_identity_of

_DAEMON_TIMEOUT_S = 30.0
_DRAM_SIZE_BYTES_MIN = 512 << 20


class Demo:
    """One run: its phases in order, and what they found."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, shown: Progressing) -> None:
        self._quick: bool = arguments.quick
        self._dtype: str = arguments.dtype
        self._sabotage: str = arguments.sabotage
        self._folder = folder
        self._shown = shown
        on_gpu = has_gpu()
        self._model = Path(arguments.model) if arguments.model else self._make_model(on_gpu=on_gpu)
        self._scale = (QUICK if self._quick else ON_GPU if on_gpu else Scale()).within(_window_of(self._model))
        self._weights_identity = weights_identity_of(self._model)
        self._conversations: list[Conversation] = []
        self._reference: dict[tuple[int, int], Finished] = {}
        self.rows: list[Row] = []
        self.problems: list[str] = []

    def run(self) -> Control:
        """All phases.

        Raises:
            DemoFailedError: A process died, or did not do what it was asked.
        """
        ready = self._recompute()
        scale = self._scale
        engine_restart, daemon_restart = scale.engine_restart_before_turn, scale.daemon_restart_before_turn
        with self._serving("the daemon", ready) as daemon:
            self._resume("engine 1", daemon, range(engine_restart), "Engine 1 with the service")
            self._resume("engine 2", daemon, range(engine_restart, daemon_restart), "Engine 2, a new process")
            daemon.stop()
        self._shown.phase("Engine and daemon restarted: what is left is on NVMe", steps=1)
        with self._serving("the restarted daemon", ready) as daemon:
            self._shown.step(
                f"process {daemon.process_id}, {daemon.wait_recovered(_DAEMON_TIMEOUT_S)} blocks found again"
            )
            control = self._resume_restarted(daemon, range(daemon_restart, scale.turns))
            self._overflow(daemon)
            daemon.stop()
        return control

    def _make_model(self, *, on_gpu: bool) -> Path:
        folder = self._folder / "model"
        self._shown.phase("Making a small Llama with seeded random weights", steps=1)
        write_model(folder, QUICK_SHAPE if self._quick else GPU_SHAPE if on_gpu else ModelShape())
        self._shown.step(f"{(folder / 'model.safetensors').stat().st_size >> 20} MiB")
        return folder

    def _engine(self, name: str, *extra: str, window_tokens: int = 0) -> EngineProcess:
        arguments = ["--model", str(self._model), "--weights-identity", self._weights_identity]
        arguments += ["--dtype", self._dtype, "--name", name, "--rows", str(self._scale.conversations)]
        # Every turn is cut to its length, so no conversation grows beyond this.
        arguments += ["--window-tokens", str(window_tokens or self._scale.conversation_tokens)]
        return EngineProcess(name, [*arguments, *extra], self._folder)

    @contextmanager
    def _serving(self, name: str, ready: Ready) -> Iterator[DaemonProcess]:
        """A daemon that serves; whatever else fails meanwhile, its end is the reason."""
        with self._daemon(name, ready) as daemon:
            daemon.wait_ready(_DAEMON_TIMEOUT_S)
            try:
                yield daemon
            except DemoFailedError as error:
                if daemon.ended:
                    raise daemon.died("conversations ran") from error
                raise

    def _daemon(self, name: str, ready: Ready) -> DaemonProcess:
        blocks = self._scale.conversations * (self._scale.conversation_tokens // ready.tokens_per_block + 1)
        dram_bytes = max(_DRAM_SIZE_BYTES_MIN, blocks * ready.block_size_bytes * 3 // 2)
        return DaemonProcess(name, self._folder, dram_bytes=dram_bytes)

    def _recompute(self) -> Ready:
        scale = self._scale
        turns = scale.conversations * scale.turns
        self._shown.phase("Engine without the service: every turn recomputed", steps=turns + 1)
        with self._engine("reference engine") as engine:
            ready = engine.wait_ready(ANSWER_TIMEOUT_S)
            self._shown.step(f"{ready.layers} layers in {ready.dtype} on {ready.device}, process {ready.process_id}")
            engine.send(
                MakeUserTurns(scale.conversations, scale.turns, scale.first_turn_tokens, scale.next_turn_tokens)
            )
            said = engine.expect(UserTurns, ANSWER_TIMEOUT_S, doing="making the users' turns")
            self._conversations = [Conversation(index, turns) for index, turns in enumerate(said.tokens)]

            def finished(conversation: Conversation, turn: int, result: Finished) -> None:
                conversation.answers.append(result.tokens)
                self._reference[conversation.index, turn] = result
                self._shown.step(
                    f"conversation {conversation.index + 1} turn {turn + 1}: {result.computed_tokens} tokens computed, "
                    f"first token after {result.ttft_s * 1000:.1f} ms"
                )

            run_turns(
                engine,
                self._conversations,
                range(scale.turns),
                answer_tokens=scale.answer_tokens,
                finished=finished,
            )
            engine.quit()
        return ready

    def _resume(self, name: str, daemon: DaemonProcess, turns: range, phase: str) -> None:
        with self._attached_engine(name, daemon, turns, phase) as engine:
            self._run_resumed(engine, turns)
            engine.quit()

    def _resume_restarted(self, daemon: DaemonProcess, turns: range) -> Control:
        with self._attached_engine("engine 3", daemon, turns, "Engine 3, from the restarted daemon") as engine:
            self._run_resumed(engine, turns, restarted_before=turns[0])
            control = self._run_control(engine, turns[-1])
            engine.quit()
        return control

    def _overflow(self, daemon: DaemonProcess) -> None:
        """One more conversation, with a window that it outgrows; then the same prompts recomputed."""
        scale, turns = self._scale, range(self._scale.overflow_turns)
        self._shown.phase("Engine 4: a conversation that outgrows its window", steps=2 * len(turns) + 2)
        extra = ["--truncate", *(["--sabotage", self._sabotage] if self._sabotage else [])]
        window_tokens = scale.overflow_window_tokens
        resumed: list[Finished] = []
        rows: list[Row] = []
        with self._engine(
            "engine 4", "--socket-dir", str(daemon.socket_dir), *extra, window_tokens=window_tokens
        ) as engine:
            ready = engine.wait_ready(ANSWER_TIMEOUT_S)
            first, following = scale.overflow_first_turn_tokens, scale.overflow_next_turn_tokens
            # One more than those before: the first ones begin like the conversations that are saved already.
            engine.send(MakeUserTurns(scale.conversations + 1, len(turns), first, following))
            said = engine.expect(UserTurns, ANSWER_TIMEOUT_S, doing="making the user's turns")
            conversation = Conversation(scale.conversations, said.tokens[-1])
            self._shown.step(f"process {ready.process_id}, a window of {window_tokens} tokens")
            for turn in turns:
                resumed.append(run_one(engine, conversation.request(turn, answer_tokens=scale.answer_tokens)))
                conversation.answers.append(resumed[-1].tokens)
                drain(engine)  # the user reads the answer
                self._shown.step(f"turn {turn + 1}: {resumed[-1].computed_tokens} tokens computed")
            engine.quit()
        with self._engine("second reference engine", "--truncate", window_tokens=window_tokens) as engine:
            engine.wait_ready(ANSWER_TIMEOUT_S)
            self._shown.step("the same prompts, cut in the same way and recomputed")
            for turn in turns:
                reference = run_one(engine, conversation.request(turn, answer_tokens=scale.answer_tokens))
                row = compare(
                    reference,
                    resumed[turn],
                    conversation=conversation.index,
                    turn=turn,
                    engine="engine 4",
                    plane=ready.plane,
                    history_tokens=resumed[turn].prompt_tokens - len(conversation.user_turns[turn]),
                    history_reproduced=True,
                    from_nvme=False,
                    tokens_per_block=ready.tokens_per_block,
                    dtype=ready.dtype,
                )
                rows.append(row)
                self._shown.row(row)
            engine.quit()
        self.rows += rows
        self.problems += overflow_problems(rows, window_tokens=window_tokens)

    def _attached_engine(self, name: str, daemon: DaemonProcess, turns: range, phase: str) -> EngineProcess:
        numbers = f"turn {turns[0] + 1}" + (f" to {turns[-1] + 1}" if len(turns) > 1 else "")
        self._shown.phase(f"{phase}: {numbers}", steps=self._scale.conversations * len(turns) + 1)
        extra = ["--socket-dir", str(daemon.socket_dir)]
        return self._engine(name, *extra, *(["--sabotage", self._sabotage] if self._sabotage else []))

    def _run_resumed(self, engine: EngineProcess, turns: range, *, restarted_before: int = -1) -> None:
        # `restarted_before`: the turn before which the daemon was restarted.
        ready = engine.wait_ready(ANSWER_TIMEOUT_S)
        if not ready.attached:
            raise DemoFailedError(f"{engine.name} did not attach to the daemon")
        self._shown.step(f"process {ready.process_id}, attached; blocks travel by {ready.plane}")

        def finished(conversation: Conversation, turn: int, result: Finished) -> None:
            row = compare(
                self._reference[conversation.index, turn],
                result,
                conversation=conversation.index,
                turn=turn,
                engine=engine.name,
                plane=ready.plane,
                history_tokens=len(conversation.history(turn)),
                history_reproduced=all(
                    row.tokens_identical for row in self.rows if row.conversation == conversation.index + 1
                ),
                from_nvme=turn == restarted_before,
                tokens_per_block=ready.tokens_per_block,
                dtype=ready.dtype,
            )
            self.rows.append(row)
            self._shown.row(row)

        run_turns(engine, self._conversations, turns, answer_tokens=self._scale.answer_tokens, finished=finished)
        drained = drain(engine)
        if not drained.in_time:
            self.problems.append(f"{engine.name} did not finish saving: {drained.stats}")

    def _run_control(self, engine: EngineProcess, turn: int) -> Control:
        self._shown.phase("Control: the same turn with corrupted keys and values", steps=2)
        conversation = self._conversations[0]
        answers: list[Finished] = []
        for armed in (True, False):
            engine.send(CorruptLoads(armed=armed))
            engine.expect(Done, ANSWER_TIMEOUT_S, doing="preparing the control")
            request = conversation.request(
                turn, answer_tokens=self._scale.answer_tokens, suffix=" corrupted" if armed else " again"
            )
            answers.append(run_one(engine, request))
            self._shown.step("sign of every loaded number flipped" if armed else "and as loaded")
        reference = self._reference[conversation.index, turn]
        return judge_control(reference, *answers, dtype=self._dtype)


def has_gpu() -> bool:
    """Whether engines will run on a GPU. Asks torch in a process of its own: this one does without it."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() == "True"


def _window_of(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DemoFailedError(f"{model} is no folder of a model: {error}") from error
    return int(config.get("max_position_embeddings", sys.maxsize))


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns 0 when everything held, 1 when anything was off."""
    arguments = _parser().parse_args(argv)
    console = made_console()
    problems: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-demo-")))
        try:
            with Progressing(console) as shown:
                demo = Demo(arguments, folder, shown)
                control = demo.run()
        except (DemoFailedError, FileNotFoundError) as error:
            console.print(f"The demo could not finish: {error}", style="red", markup=False, soft_wrap=True)
            return 1
    summary = summarise(demo.rows)
    problems = [
        *demo.problems,
        *(
            f"conversation {row.conversation} turn {row.turn}: {problem}"
            for row in demo.rows
            for problem in row.problems
        ),
        *control.problems,
    ]
    console.print(table_of(demo.rows))
    _print_words(console, summary, control, problems, arguments.dtype)
    if arguments.json:
        Path(arguments.json).write_text(_json(demo.rows, control, summary, problems))
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvservice demo",
        description="Multi-turn conversations on a small Llama, recomputed and resumed from the service, side by side.",
    )
    parser.add_argument("--model", default="", help="folder of a local model instead of the small random one")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="float32 must give identical tokens; the others round more, there logits are compared (default: float32)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and short conversations")
    parser.add_argument("--json", default="", metavar="FILE", help="write all rows and the summary to a file")
    parser.add_argument(
        "--sabotage",
        default="",
        choices=("lose-blocks", "corrupt-blocks"),
        help="break the engine on purpose, to see that the demo notices: the exit status must be 1",
    )
    return parser


def _print_words(console: Console, summary: Summary, control: Control, problems: Sequence[str], dtype: str) -> None:
    identity = "." if dtype == "float32" else f"; in {dtype} they may differ, the logits are what is compared."
    difference = "differed, as they must" if control.tokens_differ else "did NOT differ"
    lines = [
        (
            f"{summary.resumed_turns} turns with history: time to first token "
            f"{summary.median_ttft_recomputed_ms:.0f} ms recomputed, {summary.median_ttft_resumed_ms:.0f} ms resumed, "
            f"{summary.median_speed_up:.1f}x sooner (medians)."
        ),
        (
            f"{summary.computed_tokens:,} of {summary.prompt_tokens:,} prompt tokens went through the model: "
            f"{summary.prefill_saved:.0%} of the prefill was saved."
        ),
        f"{summary.nvme_turns} turns resumed from NVMe, after the daemon's restart.",
        (
            f"{summary.truncated_turns} turns after a window had overflowed: their tokens are approximate, "
            "see docs/truncation.md."
        ),
        f"Tokens were identical in {summary.identical_turns} of {summary.turns} turns{identity}",
        (
            f"Control: with corrupted keys and values the tokens {difference} "
            f"(logits by up to {control.logits_difference_max:.1f})."
        ),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for problem in problems:
        console.print(f"PROBLEM {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    console.print("Something is off." if problems else "All checks passed.", style="red" if problems else "green")


def _json(rows: Sequence[Row], control: Control, summary: Summary, problems: Sequence[str]) -> str:
    document = {
        "rows": [dataclasses.asdict(row) | {"speed_up": row.speed_up} for row in rows],
        "control": dataclasses.asdict(control),
        "summary": dataclasses.asdict(summary) | {"prefill_saved": summary.prefill_saved},
        "problems": list(problems),
    }
    return json.dumps(document, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
