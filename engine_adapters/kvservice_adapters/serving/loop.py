"""loop: a small serving loop: one prompt at a time, all running sequences decoded together.

    submit -> ArrivalQueue -> prefill (prefix from the service, the rest computed) -> decode batch -> Result

The service is told of the arrival queue, so that what waits is fetched before its turn. On a GPU a prefix arrives layer
by layer during its prefill, or was loaded ahead, while those before it were computed.
One thread drives `step`; `submit` and `waiting` may be called from any.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

import kvservice_client
from kvservice_adapters.serving.counting import ForwardCounter
from kvservice_adapters.serving.requests import (
    ArrivalQueue,
    FinishReason,
    Request,
    Result,
    Waiting,
    WindowExceeded,
)
from kvservice_adapters.serving.sampling import TokenChooser
from kvservice_adapters.serving.slots import SlotCache
from kvservice_adapters.transformers import (
    BlockLayout,
    DrainOutcome,
    PrefixLoad,
    TrackedSequence,
    TransformersAdapter,
    UnsupportedModel,
    layout_of,
)
from kvservice_adapters.truncation import FittedPrompt, PromptTooLong, TruncationPolicy

_ATTENTIONS = ("sdpa", "eager")
_WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class FirstToken:
    """A request's first token is there."""

    request_id: str
    ttft_s: float


@dataclass(frozen=True)
class StepReport:
    """What happened in one step."""

    first_tokens: list[FirstToken] = field(default_factory=list)
    finished: list[Result] = field(default_factory=list)


@dataclass
class _Running:
    # One row of the batch: `length` tokens are in the cache, the last chosen token is not among them yet.
    request: Request
    chooser: TokenChooser
    tracked: TrackedSequence | None  # None: this loop runs without a service
    length: int
    dropped_tokens: int
    reused_tokens: int
    computed_tokens: int
    ttft_s: float
    prefill_s: float
    prompt_logits: torch.Tensor
    generated: list[int]

    @property
    def stopped(self) -> bool:
        return self.generated[-1] in self.request.stop_token_ids

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.generated) >= self.request.max_new_tokens


class ServingLoop:
    """Continuous batching on a transformers model, with or without the service."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: TransformersAdapter | None = None,
        *,
        rows: int = 4,
        window_tokens: int = 4096,
        waiting_max: int = 1024,
        truncation: TruncationPolicy | None = None,
    ) -> None:
        """Allocate the batch's cache.

        Args:
            model: A decoder model in evaluation mode, attention "sdpa" or "eager".
            adapter: Where prefixes come from and blocks go; None: everything is computed.
            rows: How many sequences are decoded together.
            window_tokens: The longest sequence, prompt and output.
            waiting_max: How many requests may wait.
            truncation: How conversations that outgrow its window are cut, if their request names a session; None:
                like the adapter, and without one they are refused.

        Raises:
            ValueError: The truncation's window is larger than the loop's, or it is not the adapter's.
            UnsupportedModel: The model's cache or its attention does not work in rows.
        """
        attention = str(model.config._attn_implementation)  # noqa: SLF001 - transformers has no other name for it
        if attention not in _ATTENTIONS:
            raise UnsupportedModel(f"attention {attention!r}: the loop needs one of {_ATTENTIONS}")
        self._attention = attention
        self._model = model.eval()  # type: ignore[no-untyped-call]
        self._adapter = adapter
        layout: BlockLayout = adapter.served.layout if adapter else layout_of(model, tokens_per_block=1)
        self._cache = SlotCache(layout, rows=rows, window_tokens=window_tokens, device=model.device)
        self._dtype = layout.dtype
        self._rows = rows
        self._window_tokens = window_tokens
        self._truncation = truncation or (adapter.truncation if adapter else None)
        if self._truncation and self._truncation.window_tokens > window_tokens:
            raise ValueError(
                f"conversations are cut at {self._truncation.window_tokens} tokens, rows have {window_tokens}"
            )
        if adapter and self._truncation != adapter.truncation:
            raise ValueError("the loop and its adapter cut conversations in different ways: give it to the adapter")
        self._vocabulary = int(model.config.vocab_size)
        self._queue = ArrivalQueue(length_max=waiting_max)
        self._running: list[_Running] = []
        self._counter = ForwardCounter(model)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """The requests that wait, next one first."""
        return self._queue.snapshot()

    @property
    def running(self) -> tuple[Request, ...]:
        """The requests that are being decoded."""
        return tuple(running.request for running in self._running)

    @property
    def computed_positions(self) -> int:
        """All positions that went through the model's forward since the loop was made."""
        return self._counter.positions

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            WindowExceeded: Prompt and output do not fit into the window, and there is no history to be dropped.
            QueueFull: Too many requests wait.
            ValueError: The prompt is empty or holds no token ids of this model, or no token is asked for.
        """
        if not request.tokens or request.max_new_tokens < 1:
            raise ValueError(f"request {request.request_id!r} has no prompt or asks for no token")
        # Here, where the one who asked hears of it: inside a step it would end all others as well.
        if not 0 <= min(request.tokens) <= max(request.tokens) < self._vocabulary:
            raise ValueError(f"request {request.request_id!r} holds ids outside 0 to {self._vocabulary - 1}")
        prompt = self._fitted(request)
        needed = len(request.tokens if prompt is None else prompt.tokens) + request.max_new_tokens
        if needed > self._window_tokens:
            raise WindowExceeded(
                f"request {request.request_id!r} needs {needed} tokens ({len(request.tokens)} of prompt, "
                f"{request.max_new_tokens} of output); the window has {self._window_tokens}"
            )
        tracked, told = None, None
        if self._adapter:
            tracked = self._adapter.track(
                prompt or request.tokens, session_id=request.session_id, request_id=request.request_id
            )
            told = kvservice_client.WaitingRequest(
                request.request_id, tuple(tracked.chain.hashes), session_id=request.session_id
            )
        self._queue.push(Waiting(request, time.perf_counter(), tracked, told, prompt))
        self._tell_queue()

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Prefill the next request if a row is free, then decode one token for every running sequence."""
        report = StepReport()
        if len(self._queue) and len(self._running) < self._rows:
            waiting = self._queue.pop()
            self._tell_queue(started=[waiting.request.request_id])
            self._admit(waiting, report)
            self._retire_finished(report)
        if self._running:
            self._decode()
            self._retire_finished(report)
        return report

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kind of forward once and take all memory, so that the first request pays for neither.

        Raises:
            RuntimeError: Requests are running already.
        """
        if self._running:
            raise RuntimeError("warm_up is for a loop that runs nothing yet")
        tokens = (0,) * min(_WARM_UP_TOKENS, self._window_tokens // 2)
        before = self._counter.positions
        self._prefill(tokens, 0, 0)
        self._prefill(tokens, 0, len(tokens))
        self._decode_step([0] * self._rows, [len(tokens)] * self._rows)
        self._counter.positions = before
        if self._adapter:
            self._adapter.prepare(tokens=self._window_tokens)

    def run_until_idle(self) -> list[Result]:
        """Step until nothing waits or runs; results in the order of finishing."""
        results: list[Result] = []
        while len(self._queue) or self._running:
            results.extend(self.step().finished)
        return results

    def drain(self, timeout_s: float) -> DrainOutcome:
        """Wait until all blocks queued for saving are saved or given up."""
        return self._adapter.drain(timeout_s) if self._adapter else DrainOutcome.DRAINED

    def close(self) -> None:
        """Take the hook off the model; the adapter stays the caller's."""
        self._counter.detach()

    def _fitted(self, request: Request) -> FittedPrompt | None:
        if self._truncation is None or not request.session_id:
            return None
        try:
            return self._truncation.fit(
                request.tokens, session_id=request.session_id, max_new_tokens=request.max_new_tokens
            )
        except PromptTooLong as error:
            raise WindowExceeded(f"request {request.request_id!r}: {error}") from None

    def _admit(self, waiting: Waiting, report: StepReport) -> None:
        request, row, started_s = waiting.request, len(self._running), time.perf_counter()
        tracked, load = waiting.tracked, None
        if self._adapter and tracked:
            load = self._adapter.begin(tracked, lambda _blocks: self._cache.row(row))
        before, computing_since_s = self._counter.positions, time.perf_counter()
        logits, reused = self._first_logits(waiting.tokens, row, load)
        chooser = TokenChooser(request.sampling)
        token = chooser.choose(logits)
        now_s = time.perf_counter()
        # Where layers were waited for, the time says nothing of the speed of computing.
        if self._adapter and load and load.is_complete:
            self._adapter.prefilled(tokens=len(waiting.tokens) - reused, seconds=now_s - computing_since_s)
        self._running.append(
            _Running(
                request=request,
                chooser=chooser,
                tracked=tracked,
                length=len(waiting.tokens),
                dropped_tokens=len(request.tokens) - len(waiting.tokens),
                reused_tokens=reused,
                computed_tokens=self._counter.positions - before,
                ttft_s=now_s - waiting.arrived_at_s,
                prefill_s=now_s - started_s,
                prompt_logits=logits.float().cpu(),
                generated=[token],
            )
        )
        report.first_tokens.append(FirstToken(request.request_id, now_s - waiting.arrived_at_s))
        self._store(row)

    def _tell_queue(self, *, started: Sequence[str] = ()) -> None:
        if self._adapter:
            told = [waiting.told for waiting in self._queue.snapshot() if waiting.told]
            self._adapter.update_queue(told, started=started)

    def _first_logits(self, tokens: tuple[int, ...], row: int, load: PrefixLoad | None) -> tuple[torch.Tensor, int]:
        # The logits behind a prompt, and how many of its tokens were loaded for them.
        if load is None:
            return self._prefill(tokens, row, 0), 0
        logits = self._prefill(tokens[load.tokens :], row, load.tokens, load)
        self._begin_ahead()
        reused = load.finish()
        if reused < load.tokens:
            # It did not arrive, and the logits are those of whatever was in the row.
            logits = self._prefill(tokens, row, 0)
        return logits, reused

    def _begin_ahead(self) -> None:
        # Called while the device is busy: what waits is loaded meanwhile.
        if self._adapter:
            for waiting in self._queue.snapshot():
                if waiting.tracked and not self._adapter.begin_ahead(waiting.tracked):
                    return

    def _prefill(self, tokens: tuple[int, ...], row: int, start: int, load: PrefixLoad | None = None) -> torch.Tensor:
        device = self._model.device
        self._cache.place_prompt(row, start, load)
        positions = torch.arange(start, start + len(tokens), device=device)
        output = self._model(
            input_ids=torch.tensor([tokens], dtype=torch.long, device=device),
            position_ids=positions.unsqueeze(0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _decode(self) -> None:
        logits = self._decode_step(
            [running.generated[-1] for running in self._running], [running.length for running in self._running]
        )
        self._begin_ahead()
        for row, running in enumerate(self._running):
            running.length += 1
            if running.tracked:
                running.tracked.extend(running.generated[-1:])
            running.generated.append(running.chooser.choose(logits[row]))
            self._store(row)

    def _decode_step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        # One token for each of the first rows, at the end of what each holds; logits [rows, vocabulary].
        device = self._model.device
        positions = self._cache.place_step(lengths, device)
        output = self._model(
            input_ids=torch.tensor(tokens, dtype=torch.long, device=device).unsqueeze(1),
            position_ids=positions.unsqueeze(1),
            attention_mask=self._step_mask(positions, longest=max(lengths) + 1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _step_mask(self, positions: torch.Tensor, *, longest: int) -> torch.Tensor:
        # [rows, 1, 1, longest]: each row sees its own tokens, the one being written included.
        visible = torch.arange(longest, device=positions.device) <= positions[:, None]
        visible = visible[:, None, None, :]
        if self._attention == "sdpa":
            return visible
        hidden = torch.finfo(self._dtype).min
        return torch.zeros(visible.shape, dtype=self._dtype, device=positions.device).masked_fill(~visible, hidden)

    def _store(self, row: int) -> None:
        running = self._running[row]
        if self._adapter and running.tracked:
            self._adapter.store(running.tracked, self._cache.row(row), length_tokens=running.length)

    def _retire_finished(self, report: StepReport) -> None:
        for row in reversed(range(len(self._running))):
            running = self._running[row]
            if not running.finished:
                continue
            if self._adapter and running.tracked:
                self._adapter.finish(running.tracked, length_tokens=running.length)
            report.finished.append(_result_of(running))
            last = self._running.pop()
            if last is not running:
                self._cache.move_row(len(self._running), row, last.length)
                self._running[row] = last


def _result_of(running: _Running) -> Result:
    request = running.request
    return Result(
        request_id=request.request_id,
        session_id=request.session_id,
        tokens=tuple(running.generated),
        finish_reason=FinishReason.STOPPED if running.stopped else FinishReason.LENGTH,
        prompt_tokens=len(request.tokens) - running.dropped_tokens,
        dropped_tokens=running.dropped_tokens,
        history_tokens=request.history_tokens,
        reused_tokens=running.reused_tokens,
        computed_tokens=running.computed_tokens,
        ttft_s=running.ttft_s,
        prefill_s=running.prefill_s,
        prompt_logits=running.prompt_logits,
    )
