"""adapter: Hugging Face transformers on the service; load before generation, save behind its back."""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from transformers import PreTrainedModel

import kvservice_client
from kvservice_adapters.hashing import BlockChain
from kvservice_adapters.service import KVClient
from kvservice_adapters.speed import PrefillSpeed
from kvservice_adapters.transformers.cache import PrefixCache
from kvservice_adapters.transformers.counters import AdapterCounters, AdapterStats
from kvservice_adapters.transformers.layout import KVRows
from kvservice_adapters.transformers.loading import PrefixLoad, PrefixLoader
from kvservice_adapters.transformers.paths import BlockPath, HostPath, RowsFor
from kvservice_adapters.transformers.positions import positions_of
from kvservice_adapters.transformers.saving import BackgroundSaver, DrainOutcome
from kvservice_adapters.transformers.sequence import TrackedSequence
from kvservice_adapters.transformers.support import ServedModel, serve_model
from kvservice_adapters.truncation import FittedPrompt, TruncationPolicy
from kvservice_client.device import PlaneInUse
from kvservice_cuda.api import CudaError

_log = logging.getLogger(__name__)

SocketDir: TypeAlias = str | os.PathLike[str] | None


@dataclass(frozen=True)
class AdapterOptions:
    """Knobs of an adapter; the defaults suit one engine on a busy node."""

    # Host memory for blocks on their way to the service. More: longer prompts are saved in one go.
    save_queue_size_bytes: int = 512 << 20
    # In its place on a GPU: GPU memory for blocks on their way to and from the service. 0: 3 % of the GPU's memory.
    hbm_buffer_size_bytes: int = 0
    save_deadline_s: float = 10.0
    # A load that takes longer is recomputed: it would not have been worth waiting for.
    load_deadline_s: float = 5.0
    # Compute what is held where that is faster than loading it, by measured speeds. Off: load whatever is held.
    recompute_if_faster: bool = True
    # How long a load waits for this process's own saves of the same blocks.
    settle_timeout_s: float = 0.5
    attach_timeout_s: float = 5.0
    copy_threads: int = 2


class TransformersAdapter:
    """Resumes sequences of one model from the service, and saves what it computes.

        adapter = TransformersAdapter(model, "/run/kvservice", weights_identity=weights_identity_of(folder))
        cache = adapter.load(input_ids, session_id="conversation 7")
        output_ids = model.generate(input_ids, past_key_values=cache, max_new_tokens=100)
        adapter.save(output_ids, cache)

    The serving loop uses the steps below `load` and `save`: `track`, `fetch`, `store`.

    No failure of the service reaches the engine: what cannot be loaded is recomputed, what cannot be
    saved is not, and `stats` says how often and why. `track`, `fetch` and `store` are called by the
    engine's thread; `stats` and `drain` by any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        service: KVClient | SocketDir = None,
        *,
        weights_identity: str = "",
        tokens_per_block: int = 16,
        salt: str = "",
        instance_name: str = "transformers",
        options: AdapterOptions | None = None,
        truncation: TruncationPolicy | None = None,
        path: BlockPath | None = None,
    ) -> None:
        """Check the model, attach, start the saving thread.

        Args:
            model: The loaded model. One token is run through it.
            service: The daemon's socket folder (None: the default one), or a client that is attached under
                `serve_model(...).namespace`.
            weights_identity, tokens_per_block, salt: See `serve_model`.
            instance_name: For people: what the daemon shows for this engine.
            options: Sizes and deadlines.
            truncation: How conversations that outgrow the window are cut; see `fit`. None: they are not.
            path: How blocks travel, made for the same model and service; the adapter closes it. None: by the model's
                device.

        Raises:
            UnsupportedModel: This model's cache cannot be stored by token prefix.
            UnsupportedPositions: A truncation is given, and this model's saved keys cannot move.
            ValueError: The weights have no identity.
            KVServiceError: The daemon refuses this engine (credentials, another geometry under the same
                fingerprint). A daemon that is absent is no error.
        """
        self.options = options or AdapterOptions()
        self.served: ServedModel = serve_model(
            model, tokens_per_block=tokens_per_block, weights_identity=weights_identity, salt=salt
        )
        if truncation is not None and truncation.tokens_per_block % tokens_per_block:
            raise ValueError(
                f"the truncation cuts between blocks of {truncation.tokens_per_block} tokens, which are no multiple of "
                f"the adapter's {tokens_per_block}"
            )
        self.truncation = truncation
        self._rope = None if truncation is None else positions_of(model)
        self._model = model
        self._client, self._owns_client = self._client_for(service, instance_name)
        self._counters = AdapterCounters()
        self._path = path or self._path_for_device()
        self._saver = BackgroundSaver(self._path, self._counters, deadline_s=self.options.save_deadline_s)
        self._speed = PrefillSpeed()
        self._loader = PrefixLoader(
            self._client,
            self._path,
            self._saver,
            self._counters,
            self.served.namespace,
            deadline_s=self.options.load_deadline_s,
            settle_timeout_s=self.options.settle_timeout_s,
            speed=self._speed if self.options.recompute_if_faster else None,
        )
        self._hooks = (
            model.register_forward_pre_hook(_check_input, with_kwargs=True),
            model.register_forward_hook(_check_output, with_kwargs=True),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fit(self, input_ids: torch.Tensor | Sequence[int], *, session_id: str, max_new_tokens: int) -> FittedPrompt:
        """What of a conversation is to be run so that it stays inside the window.

        Args:
            input_ids: The whole conversation, whatever was dropped before, [tokens] or [1, tokens].

        Raises:
            PromptTooLong: What is new does not fit, whatever is dropped.
            ValueError: This adapter has no truncation; or the conversation must be cut and names no session.
        """
        if self.truncation is None:
            raise ValueError("this adapter was made without a truncation: say how conversations are to be cut")
        return self.truncation.fit(token_list(input_ids), session_id=session_id, max_new_tokens=max_new_tokens)

    def load(
        self, input_ids: torch.Tensor | Sequence[int] | FittedPrompt, *, session_id: str = "", request_id: str = ""
    ) -> PrefixCache:
        """Make a cache that holds the longest prefix the service has; at least one token stays to compute.

        On a GPU the prefix may still be arriving when this returns: each layer waits where the model first needs it,
        and a prefix that did not arrive is computed behind the model's first forward, before it returns.

        Args:
            input_ids: The prompt, [tokens] or [1, tokens]; or what `fit` made, which knows its session.
            session_id: The conversation, so that it can be told apart and forgotten.
            request_id: This request.

        Raises:
            ValueError: More than one sequence, or none.
        """
        prompt = input_ids if isinstance(input_ids, FittedPrompt) else token_list(input_ids)
        sequence = self.track(prompt, session_id=session_id, request_id=request_id)
        cache = PrefixCache(self._model.config, sequence)
        load = self.begin(sequence, lambda blocks: cache.make_room(self.served.layout, blocks, self.served.device))
        cache.expect(load)
        return cache

    def save(self, output_ids: torch.Tensor | Sequence[int], cache: PrefixCache) -> None:
        """Queue every full block of a cache that is not saved yet; returns as soon as the bytes are copied out.

        Args:
            output_ids: The whole sequence that was run with this cache, prompt included, [tokens] or [1, tokens].
            cache: What `load` returned, after generation.

        Raises:
            ValueError: The tokens do not continue the ones that were loaded, or the cache holds several sequences.
        """
        tokens = token_list(output_ids)
        known = cache.sequence.chain.tokens
        if tokens[: len(known)] != known:
            raise ValueError("output_ids do not begin with the tokens this cache was loaded for")
        cache.sequence.extend(tokens[len(known) :])
        self.store(cache.sequence, cache.rows(), length_tokens=min(cache.get_seq_length(), len(tokens)))
        self.finish(cache.sequence, length_tokens=min(cache.get_seq_length(), len(tokens)))

    def track(
        self, tokens: Sequence[int] | FittedPrompt, *, session_id: str = "", request_id: str = ""
    ) -> TrackedSequence:
        """Hash a prompt's blocks and follow the sequence from here on.

        Raises:
            ValueError: No token, or one that is no token id.
        """
        namespace = self.served.namespace
        if isinstance(tokens, FittedPrompt):
            chain = tokens.chain(namespace.fingerprint, namespace.tokens_per_block)
            return TrackedSequence(chain, session_id=tokens.session_id, request_id=request_id, prompt=tokens)
        if len(tokens) == 0:
            raise ValueError("the prompt has no token")
        chain = BlockChain(namespace.fingerprint, namespace.tokens_per_block, tokens)
        return TrackedSequence(chain, session_id=session_id, request_id=request_id)

    def begin(self, sequence: TrackedSequence, rows_for: RowsFor) -> PrefixLoad:
        """Begin to load the longest held prefix into an engine's cache; what was begun ahead goes on.

        Let the forward wait for each layer of the load, and ask `finish` behind it. Only then is it known whether what
        was computed is right; if not, compute the prompt from its first token.

        Args:
            sequence: A sequence of which nothing is computed yet.
            rows_for: Called with the number of blocks that may arrive; returns the cache to put them into. Not called
                where nothing arrives.
        """
        return self._loader.begin(sequence, rows_for)

    def begin_ahead(self, sequence: TrackedSequence) -> bool:
        """Begin to load the prefix of a sequence that waits, where there is room for it outside the engine's cache.

        Call it in the order of the queue, until it says no, while the device is busy; again with every step.

        Returns:
            Whether the sequence was seen to; no: not yet.
        """
        return self._loader.begin_ahead(sequence)

    def fetch(self, sequence: TrackedSequence, rows_for: RowsFor) -> int:
        """`begin`, and wait for its end. Blocks.

        Returns:
            Tokens that need not be computed, fewer than the prompt has; 0 where nothing could be loaded.
        """
        return self.begin(sequence, rows_for).finish()

    def store(self, sequence: TrackedSequence, rows: KVRows, *, length_tokens: int) -> None:
        """Queue the blocks that are full and not saved yet; never waits for the service.

        Args:
            sequence: The tokens the cache was computed from.
            rows: The cache; may be overwritten as soon as this returns.
            length_tokens: How many tokens of the cache are computed.
        """
        end_block = self._full_blocks(sequence, length_tokens)
        if sequence.next_save_block < end_block and self._client.attached and not sequence.gave_up_saving:
            self._saver.offer(sequence, rows, end_block=end_block)

    def finish(self, sequence: TrackedSequence, *, length_tokens: int) -> None:
        """Count the blocks that were never queued; the cache is gone after this."""
        left = self._full_blocks(sequence, length_tokens) - sequence.next_save_block
        if left > 0:
            reason = "QUEUE_FULL" if self._client.attached else "UNAVAILABLE"
            self._counters.add("skipped_blocks", left, reason="GAVE_UP" if sequence.gave_up_saving else reason)

    def prefilled(self, *, tokens: int, seconds: float) -> None:
        """The engine computed so many prompt tokens in so long: what loading is weighed against."""
        self._speed.computed(tokens, seconds)

    def update_queue(
        self, waiting: Sequence[kvservice_client.WaitingRequest], *, started: Collection[str] = ()
    ) -> None:
        """Tell the service which requests wait, the next to start first. Returns at once; see the client."""
        self._client.update_queue(waiting, started=started)

    @property
    def attached(self) -> bool:
        """Whether a daemon answers at the moment."""
        return self._client.attached

    @property
    def plane(self) -> PlaneInUse:
        """How blocks travel at present, and why not better."""
        return self._path.plane

    def prepare(self, *, tokens: int) -> None:
        """Make room to load prefixes of up to this many tokens, so that no request pays for fresh memory."""
        self._path.prepare(blocks=tokens // self.served.layout.tokens_per_block)

    def stats(self) -> AdapterStats:
        """What was loaded, saved and missed so far."""
        return self._counters.snapshot()

    def drain(self, timeout_s: float) -> DrainOutcome:
        """Wait until everything queued is saved or given up."""
        return self._saver.drain(timeout_s)

    def close(self) -> None:
        """Finish queued saves within their deadline, then detach if this adapter attached."""
        for hook in self._hooks:
            hook.remove()
        self._loader.close()
        self._saver.stop(self.options.save_deadline_s)
        self._path.close()
        if self._owns_client:
            self._client.close()

    def _client_for(self, service: KVClient | SocketDir, instance_name: str) -> tuple[KVClient, bool]:
        if service is not None and not isinstance(service, str | os.PathLike):
            return service, False
        client = kvservice_client.attach(
            self.served.namespace,
            socket_dir=None if service is None else os.fspath(service),
            instance_name=instance_name,
            attach_timeout_s=self.options.attach_timeout_s,
            copy_threads=self.options.copy_threads,
        )
        return client, True

    def _full_blocks(self, sequence: TrackedSequence, length_tokens: int) -> int:
        return min(length_tokens // self.served.layout.tokens_per_block, len(sequence.chain.hashes))

    def _path_for_device(self) -> BlockPath:
        served, client, why = self.served, self._client, ""
        if served.device.type == "cuda":
            try:
                from kvservice_adapters.transformers import device_path  # noqa: PLC0415  # needs Triton and a driver

                if isinstance(client, kvservice_client.Client):
                    return device_path.made_for(
                        client, served, rope=self._rope, size_bytes=self.options.hbm_buffer_size_bytes
                    )
                why = "the client is not the library's own"
            except (ImportError, kvservice_client.InvalidRequest, CudaError, torch.OutOfMemoryError) as error:
                why = str(error)
            _log.warning("blocks go through host memory: %s", why)
        return HostPath(
            client,
            served.layout,
            served.device,
            rope=self._rope,
            save_queue_size_bytes=self.options.save_queue_size_bytes,
            why=why,
        )


def _check_input(_model: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, PrefixCache):
        cache.check_input(kwargs)


def _check_output(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Any:
    # Behind a forward that may have computed with blocks that did not arrive: then the prefix is computed, and the
    # forward is run again. None: its output stands.
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PrefixCache) or not cache.is_arriving:
        return None
    tokens = cache.sequence.chain.tokens[: cache.reused_tokens]
    if cache.arrived():
        return None
    device = next(model.parameters()).device
    prefix = torch.tensor([tokens], dtype=torch.long, device=device)
    model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return model(*args, **kwargs)


def token_list(ids: torch.Tensor | Sequence[int]) -> list[int]:
    """One sequence's token ids, from [tokens] or [1, tokens].

    Raises:
        ValueError: The tensor holds another number of sequences.
    """
    if not isinstance(ids, torch.Tensor):
        return list(ids)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"token ids of shape {list(ids.shape)}: one sequence, [tokens] or [1, tokens], is needed")
    return [int(token) for token in ids.tolist()]
