"""scenario: conversations whose turns interleave, run on an engine turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from kvservice.demo.processes import DemoFailedError, EngineProcess
from kvservice.demo.protocol import Drain, Drained, Finished, FirstToken, Generate

# No single step of the demo takes nearly as long, not even on a slow machine with a real model.
ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Scale:
    """How much the demo does."""

    conversations: int = 3
    turns: int = 6
    # The turns from the first on are run by a second engine, from the second on by a third one and a restarted daemon.
    engine_restart_before_turn: int = 2
    daemon_restart_before_turn: int = 4
    first_turn_tokens: int = 1400
    next_turn_tokens: int = 120
    answer_tokens: int = 20
    # One more conversation outgrows a window of this size, again and again.
    overflow_window_tokens: int = 1024
    overflow_turns: int = 8

    @property
    def overflow_first_turn_tokens(self) -> int:
        """Five eighths of the window: the third or fourth turn does not fit any more."""
        return self.overflow_window_tokens * 5 // 8

    @property
    def overflow_next_turn_tokens(self) -> int:
        """An eighth of the window."""
        return self.overflow_window_tokens // 8

    @property
    def conversation_tokens(self) -> int:
        """Tokens of a whole conversation."""
        return self.first_turn_tokens + (self.turns - 1) * self.next_turn_tokens + self.turns * self.answer_tokens

    def within(self, window_tokens: int) -> Scale:
        """The same with first turns so short that a conversation fits into a model's window.

        Raises:
            DemoFailedError: The later turns alone do not fit.
        """
        excess = self.conversation_tokens - window_tokens
        if excess <= 0:
            return self
        if excess >= self.first_turn_tokens:
            raise DemoFailedError(f"the model's window of {window_tokens} tokens is too short for {self.turns} turns")
        return replace(self, first_turn_tokens=self.first_turn_tokens - excess)


ON_GPU = Scale(first_turn_tokens=6000, next_turn_tokens=250, overflow_window_tokens=4096)
QUICK = Scale(
    conversations=2,
    turns=4,
    engine_restart_before_turn=1,
    daemon_restart_before_turn=2,
    first_turn_tokens=200,
    next_turn_tokens=40,
    answer_tokens=12,
    overflow_window_tokens=256,
)


@dataclass
class Conversation:
    """One user's turns, and the history so far: what was said and answered in the reference run."""

    index: int
    user_turns: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)

    @property
    def session_id(self) -> str:
        """How the service knows this conversation."""
        return f"demo conversation {self.index + 1}"

    def history(self, turn: int) -> list[int]:
        """All tokens before a turn: every earlier user turn and its answer."""
        earlier = zip(self.user_turns[:turn], self.answers[:turn], strict=True)
        return [token for said, answered in earlier for token in said + answered]

    def request(self, turn: int, *, answer_tokens: int, suffix: str = "") -> Generate:
        """The request for a turn: the whole history and what the user says now."""
        history = self.history(turn)
        return Generate(
            request_id=f"{self.index}.{turn}{suffix}",
            session_id=self.session_id,
            tokens=history + self.user_turns[turn],
            history_tokens=len(history),
            max_new_tokens=answer_tokens,
        )


def run_turns(
    engine: EngineProcess,
    conversations: list[Conversation],
    turns: Iterable[int],
    *,
    answer_tokens: int,
    finished: Callable[[Conversation, int, Finished], None],
) -> None:
    """Run turns round robin: the next conversation's turn arrives while the others are still being answered.

    A conversation's next turn follows when its last one is answered. The next arrival waits for the
    previous one's first token, so that a turn's time to first token is its own, not its neighbours'.

    Args:
        engine: A ready engine.
        conversations: Their answers must reach up to the first of `turns`, or `finished` must append them.
        turns: Indices of the turns to run, ascending.
        answer_tokens: Tokens to generate per turn.
        finished: Called for every turn that is answered, in the order of answering.

    Raises:
        DemoFailedError: The engine died or failed.
    """
    running: dict[str, tuple[Conversation, int]] = {}

    def take_event() -> str:
        # Returns the request whose first token came, or "".
        event = engine.next_event(ANSWER_TIMEOUT_S, doing="conversations ran")
        if isinstance(event, Finished):
            conversation, turn = running.pop(event.request_id)
            finished(conversation, turn, event)
        return event.request_id if isinstance(event, FirstToken) else ""

    for turn in turns:
        for conversation in conversations:
            while any(earlier is conversation for earlier, _ in running.values()):
                take_event()
            request = conversation.request(turn, answer_tokens=answer_tokens)
            running[request.request_id] = (conversation, turn)
            engine.send(request)
            while take_event() != request.request_id:
                pass
    while running:
        take_event()


def run_one(engine: EngineProcess, request: Generate) -> Finished:
    """Run a single request to its end.

    Raises:
        DemoFailedError: The engine died or failed.
    """
    engine.send(request)
    while True:
        event = engine.next_event(ANSWER_TIMEOUT_S, doing=f"request {request.request_id} ran")
        if isinstance(event, Finished):
            return event


def drain(engine: EngineProcess) -> Drained:
    """Wait until the engine has saved everything.

    Raises:
        DemoFailedError: The engine died or failed.
    """
    engine.send(Drain(timeout_s=30.0))
    return engine.expect(Drained, ANSWER_TIMEOUT_S, doing="saving")
