"""requests: what is asked of the serving loop, what waits, and what comes back."""

import enum
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import kvservice_client
from kvservice_adapters.transformers import TrackedSequence
from kvservice_adapters.truncation import FittedPrompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn with the request's own seed."""

    temperature: float = 0.0
    # Only the k likeliest tokens are drawn from; 0: all.
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature {self.temperature} and top_k {self.top_k} must not be negative")


GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """One turn of a conversation."""

    request_id: str
    tokens: tuple[int, ...]  # the whole prompt: history and what is new
    max_new_tokens: int
    session_id: str = ""
    # How many of the prompt's tokens earlier turns had already; only reported, never relied on.
    history_tokens: int = 0
    sampling: Sampling = GREEDY
    stop_token_ids: frozenset[int] = frozenset()


class FinishReason(enum.Enum):
    """Why a request ended."""

    LENGTH = "max_new_tokens reached"
    STOPPED = "one of the stop tokens came"


@dataclass(frozen=True)
class Result:
    """What a finished request got, and what it cost."""

    request_id: str
    session_id: str
    tokens: tuple[int, ...]  # generated ones, a stop token included
    finish_reason: FinishReason
    prompt_tokens: int
    # Tokens of the conversation that were left out of the prompt, so that it fits into the window.
    dropped_tokens: int
    history_tokens: int
    # Loaded from the service instead of computed.
    reused_tokens: int
    # Positions that went through the model's forward before the first token, by a hook on the model.
    computed_tokens: int
    # From submit to the first token, waiting included; and of that, from the moment it left the queue.
    ttft_s: float
    prefill_s: float
    # Logits after the prompt's last token, float32 on the CPU, [vocabulary].
    prompt_logits: torch.Tensor = field(repr=False, compare=False)


class WindowExceeded(ValueError):
    """Prompt and output do not fit into the loop's window; shorten the prompt or ask for fewer tokens."""


class QueueFull(RuntimeError):
    """As many requests wait as may wait; try again when one has finished."""


@dataclass(frozen=True)
class Waiting:
    """A request in the queue and when it came, on the clock of time.perf_counter."""

    request: Request
    arrived_at_s: float
    # Its blocks, and how the service is told of it; None: the loop runs without a service.
    tracked: TrackedSequence | None = None
    told: kvservice_client.WaitingRequest | None = None
    # What is run of a conversation that may outgrow the window; None: the request as it is.
    prompt: FittedPrompt | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is run."""
        return self.request.tokens if self.prompt is None else self.prompt.tokens


class ArrivalQueue:
    """Requests that wait, in the order in which they will be served. Any thread may push and look."""

    def __init__(self, *, length_max: int) -> None:
        self._length_max = length_max
        self._lock = threading.Lock()
        self._waiting: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self.snapshot())

    def push(self, waiting: Waiting) -> None:
        """Append a request.

        Raises:
            QueueFull: `length_max` requests wait already.
        """
        with self._lock:
            if len(self._waiting) >= self._length_max:
                raise QueueFull(f"{self._length_max} requests wait already")
            self._waiting.append(waiting)

    def pop(self) -> Waiting:
        """Take the next request.

        Raises:
            IndexError: None waits.
        """
        with self._lock:
            return self._waiting.popleft()

    def snapshot(self) -> tuple[Waiting, ...]:
        """All waiting requests, next one first."""
        with self._lock:
            return tuple(self._waiting)
