"""Which namespaces exist and who attached them: bounded, made on attach, the coldest unused one dropped for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvservice.aliases import AliasBounds, Aliases
from kvservice.blocks import DropReason, NamespaceKey, NamespaceSpec
from kvservice.config import Config
from kvservice.dram import SlotPool, slot_stride_bytes
from kvservice.errors import CapacityExhausted, InvalidRequest, LayoutMismatch, NamespaceUnknown
from kvservice.history import History
from kvservice.instances import Instances
from kvservice.metrics import Metrics
from kvservice.policies import make_policy
from kvservice.sessions import Sessions
from kvservice.store.disks import Disks
from kvservice.store.journal import Journal
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.space import Space


class Registry:
    """The namespaces by key."""

    def __init__(
        self,
        namespaces: dict[NamespaceKey, Namespace],
        instances: Instances[Namespace],
        disks: Disks,
        journal: Journal,
        space: Space,
        config: Config,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        """Args:
        namespaces: where to keep them; others read it.
        disks, journal: told of what leaves a namespace's books.
        """
        self.namespaces = namespaces
        self._instances = instances
        self.config = config
        self.clock = clock
        self._space = space
        self._metrics = metrics
        self._disks = disks
        self._journal = journal
        self._alias_bounds = AliasBounds(
            per_session=config.aliases_per_session_max,
            per_instance=config.aliases_per_instance_max,
            in_all=config.aliases_max,
        )

    async def attach(self, instance: Peer, name: str, specs: Sequence[NamespaceSpec]) -> list[int]:
        """The process becomes an instance of these namespaces; the ids of their segments.

        Raises:
            InvalidRequest, LayoutMismatch, CapacityExhausted, Overloaded.
        """
        for spec in specs:
            self._require_fits(spec)
        self._instances.attach(instance, name)
        instance.namespaces.clear()  # of an earlier attachment: its ids must not answer for these
        try:
            for spec in specs:
                instance.namespaces.append(await self._namespace_for(spec))
        except BaseException:
            instance.namespaces.clear()
            self._instances.detach(instance)
            raise
        segments = [segment for namespace in instance.namespaces for _, segment in namespace.pool.live_segments()]
        return [segment.segment_id for segment in segments]

    def attached(self, instance: Peer, namespace_id: int) -> Namespace:
        """The attached namespace of that wire id.

        Raises:
            NamespaceUnknown: not of this attachment.
        """
        if not instance.is_attached or not 1 <= namespace_id <= len(instance.namespaces):
            raise NamespaceUnknown(f"namespace id {namespace_id} is not of this attachment: attach again")
        return instance.namespaces[namespace_id - 1]

    def restore_namespace(self, spec: NamespaceSpec) -> Namespace | None:
        """The namespace of that key without memory yet; None where another geometry or too many stand against it."""
        existing = self.namespaces.get(spec.key)
        if existing is not None:
            return existing if existing.spec.same_geometry(spec) else None
        if len(self.namespaces) >= self.config.namespaces_max:
            return None
        return self._add(spec)

    def _require_fits(self, spec: NamespaceSpec) -> None:
        """Raise InvalidRequest if not even one block would fit."""
        stride_bytes = slot_stride_bytes(spec.block_size_bytes)
        rule = self.config.rule_for(spec.label)
        bound, knob = self.config.dram_bytes, "dram_bytes"
        if rule.dram_quota_bytes and rule.dram_quota_bytes < bound:
            bound, knob = rule.dram_quota_bytes, "dram_quota_bytes"
        if stride_bytes > bound:
            raise InvalidRequest(
                f"a block takes {stride_bytes} bytes, {knob} is {bound}: raise it or use smaller blocks",
                field="block_size_bytes",
            )

    async def _namespace_for(self, spec: NamespaceSpec) -> Namespace:
        """The namespace of that key, with at least one segment of memory.

        Raises:
            LayoutMismatch: it exists with other sizes.
            CapacityExhausted: no memory or no place for another namespace.
        """
        existing = self.namespaces.get(spec.key)
        if existing is None:
            existing = await self._make_namespace(spec)
        if not existing.spec.same_geometry(spec):
            raise LayoutMismatch(
                f"this fingerprint is held with {existing.spec.block_size_bytes} bytes and "
                f"{existing.spec.tokens_per_block} tokens per block and {existing.spec.hash_size_bytes}-byte hashes, "
                f"not {spec.block_size_bytes}, {spec.tokens_per_block} and {spec.hash_size_bytes}: "
                "put whatever differs into the fingerprint"
            )
        while not existing.pool.live_segments():
            await self._space.make_room(existing, 1)
        return existing

    async def _make_namespace(self, spec: NamespaceSpec) -> Namespace:
        while spec.key not in self.namespaces and len(self.namespaces) >= self.config.namespaces_max:
            await self._drop_coldest_namespace()
        if spec.key in self.namespaces:
            return self.namespaces[spec.key]  # made by another attachment meanwhile
        return self._add(spec)

    def _add(self, spec: NamespaceSpec) -> Namespace:
        rule = self.config.rule_for(spec.label)
        namespace = Namespace(
            spec=spec,
            metrics=self._metrics,
            rule=rule,
            policy=make_policy(rule.policy),
            nvme_policy=make_policy(rule.policy),
            on_extents_left=self._extents_left,
            on_alias_left=self._journal.alias_left,
            aliases=Aliases(self._alias_bounds),
            sessions=Sessions(sessions_max=self.config.sessions_max),
            history=History(blocks_max=self.config.explain_history_blocks),
            pool=SlotPool(
                slot_stride_bytes(spec.block_size_bytes),
                self._space.slots_per_segment(slot_stride_bytes(spec.block_size_bytes)),
            ),
            last_used_s=self.clock(),
        )
        self.namespaces[spec.key] = namespace
        return namespace

    def _extents_left(self, namespace: Namespace, extents: list[int]) -> None:
        self._journal.left(namespace, extents)
        self._disks.release(extents)

    def _is_idle(self, namespace: Namespace) -> bool:
        """Whether nobody attached it or holds slots of it."""
        is_attached = any(namespace in instance.namespaces for instance in self._instances)
        return not is_attached and not (namespace.pool.holders > 0).any()

    async def _drop_coldest_namespace(self) -> None:
        idle = [namespace for namespace in self.namespaces.values() if self._is_idle(namespace)]
        if not idle:
            raise CapacityExhausted(f"{self.config.namespaces_max} namespaces are in use (namespaces_max)")
        coldest = min(idle, key=lambda namespace: namespace.last_used_s)
        coldest.drop_subtrees(coldest.index.roots().tolist(), DropReason.RECLAIMED, self.clock())
        coldest.is_retired = True
        del self.namespaces[coldest.spec.key]
        await self._space.release_all(coldest)
