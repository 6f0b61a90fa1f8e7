from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_UNSPECIFIED: _ClassVar[MissReason]
    MISS_REASON_NOT_HELD: _ClassVar[MissReason]
    MISS_REASON_BEING_WRITTEN: _ClassVar[MissReason]
    MISS_REASON_PREFIX_MISSING: _ClassVar[MissReason]
    MISS_REASON_CORRUPT: _ClassVar[MissReason]
    MISS_REASON_TIER_OFFLINE: _ClassVar[MissReason]
    MISS_REASON_OVER_LIMIT: _ClassVar[MissReason]
    MISS_REASON_OTHER_SESSION: _ClassVar[MissReason]

class DropReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DROP_REASON_UNSPECIFIED: _ClassVar[DropReason]
    DROP_REASON_CAPACITY: _ClassVar[DropReason]
    DROP_REASON_RECLAIMED: _ClassVar[DropReason]
    DROP_REASON_QUOTA: _ClassVar[DropReason]
    DROP_REASON_FORGOTTEN: _ClassVar[DropReason]
    DROP_REASON_EXPIRED: _ClassVar[DropReason]
    DROP_REASON_CORRUPT: _ClassVar[DropReason]
    DROP_REASON_PREFIX_LOST: _ClassVar[DropReason]
    DROP_REASON_ABORTED: _ClassVar[DropReason]
    DROP_REASON_SOURCE_LOST: _ClassVar[DropReason]
    DROP_REASON_ALIAS_LIMIT: _ClassVar[DropReason]

class RefusedReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSED_REASON_UNSPECIFIED: _ClassVar[RefusedReason]
    REFUSED_REASON_PARENT_MISSING: _ClassVar[RefusedReason]
    REFUSED_REASON_OTHER_SESSION: _ClassVar[RefusedReason]

class QueueOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUEUE_OUTCOME_UNSPECIFIED: _ClassVar[QueueOutcome]
    QUEUE_OUTCOME_APPLIED: _ClassVar[QueueOutcome]
    QUEUE_OUTCOME_OUTDATED: _ClassVar[QueueOutcome]
    QUEUE_OUTCOME_SNAPSHOT_WANTED: _ClassVar[QueueOutcome]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_REQUEST: _ClassVar[ErrorReason]
    ERROR_REASON_NAMESPACE_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_LAYOUT_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_LEASE_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_LEASE_EXPIRED: _ClassVar[ErrorReason]
    ERROR_REASON_RESERVATION_LOST: _ClassVar[ErrorReason]
    ERROR_REASON_CAPACITY_EXHAUSTED: _ClassVar[ErrorReason]
    ERROR_REASON_QUOTA_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_OVERLOADED: _ClassVar[ErrorReason]
    ERROR_REASON_DRAINING: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]
    ERROR_REASON_PERMISSION_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
TIER_UNSPECIFIED: Tier
TIER_DRAM: Tier
TIER_NVME: Tier
MISS_REASON_UNSPECIFIED: MissReason
MISS_REASON_NOT_HELD: MissReason
MISS_REASON_BEING_WRITTEN: MissReason
MISS_REASON_PREFIX_MISSING: MissReason
MISS_REASON_CORRUPT: MissReason
MISS_REASON_TIER_OFFLINE: MissReason
MISS_REASON_OVER_LIMIT: MissReason
MISS_REASON_OTHER_SESSION: MissReason
DROP_REASON_UNSPECIFIED: DropReason
DROP_REASON_CAPACITY: DropReason
DROP_REASON_RECLAIMED: DropReason
DROP_REASON_QUOTA: DropReason
DROP_REASON_FORGOTTEN: DropReason
DROP_REASON_EXPIRED: DropReason
DROP_REASON_CORRUPT: DropReason
DROP_REASON_PREFIX_LOST: DropReason
DROP_REASON_ABORTED: DropReason
DROP_REASON_SOURCE_LOST: DropReason
DROP_REASON_ALIAS_LIMIT: DropReason
REFUSED_REASON_UNSPECIFIED: RefusedReason
REFUSED_REASON_PARENT_MISSING: RefusedReason
REFUSED_REASON_OTHER_SESSION: RefusedReason
QUEUE_OUTCOME_UNSPECIFIED: QueueOutcome
QUEUE_OUTCOME_APPLIED: QueueOutcome
QUEUE_OUTCOME_OUTDATED: QueueOutcome
QUEUE_OUTCOME_SNAPSHOT_WANTED: QueueOutcome
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_REQUEST: ErrorReason
ERROR_REASON_NAMESPACE_UNKNOWN: ErrorReason
ERROR_REASON_LAYOUT_MISMATCH: ErrorReason
ERROR_REASON_LEASE_UNKNOWN: ErrorReason
ERROR_REASON_LEASE_EXPIRED: ErrorReason
ERROR_REASON_RESERVATION_LOST: ErrorReason
ERROR_REASON_CAPACITY_EXHAUSTED: ErrorReason
ERROR_REASON_QUOTA_EXCEEDED: ErrorReason
ERROR_REASON_OVERLOADED: ErrorReason
ERROR_REASON_DRAINING: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
ERROR_REASON_PERMISSION_DENIED: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_DEADLINE_EXCEEDED: ErrorReason

class Namespace(_message.Message):
    __slots__ = ("fingerprint", "label", "block_size_bytes", "tokens_per_block", "hash_size_bytes")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    HASH_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    label: str
    block_size_bytes: int
    tokens_per_block: int
    hash_size_bytes: int
    def __init__(self, fingerprint: _Optional[bytes] = ..., label: _Optional[str] = ..., block_size_bytes: _Optional[int] = ..., tokens_per_block: _Optional[int] = ..., hash_size_bytes: _Optional[int] = ...) -> None: ...

class SharedMemoryHandles(_message.Message):
    __slots__ = ("segment_id", "slots", "generations")
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    segment_id: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, segment_id: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class Handles(_message.Message):
    __slots__ = ("shared_memory", "device")
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    shared_memory: SharedMemoryHandles
    device: DeviceHandles
    def __init__(self, shared_memory: _Optional[_Union[SharedMemoryHandles, _Mapping]] = ..., device: _Optional[_Union[DeviceHandles, _Mapping]] = ...) -> None: ...

class DeviceHandles(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("hello", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ping: Ping
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version_min", "protocol_version_max", "instance_name", "namespaces")
    PROTOCOL_VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_MAX_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    protocol_version_min: int
    protocol_version_max: int
    instance_name: str
    namespaces: _containers.RepeatedCompositeFieldContainer[Namespace]
    def __init__(self, protocol_version_min: _Optional[int] = ..., protocol_version_max: _Optional[int] = ..., instance_name: _Optional[str] = ..., namespaces: _Optional[_Iterable[_Union[Namespace, _Mapping]]] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("welcome", "pong", "segments_changed", "drain_notice")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_NOTICE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    pong: Pong
    segments_changed: SegmentsChanged
    drain_notice: DrainNotice
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., segments_changed: _Optional[_Union[SegmentsChanged, _Mapping]] = ..., drain_notice: _Optional[_Union[DrainNotice, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "daemon_version", "daemon_epoch", "instance_id", "namespace_ids", "limits", "planes", "segment_ids")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    DAEMON_EPOCH_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_IDS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    daemon_version: str
    daemon_epoch: str
    instance_id: int
    namespace_ids: _containers.RepeatedScalarFieldContainer[int]
    limits: Limits
    planes: str
    segment_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol_version: _Optional[int] = ..., daemon_version: _Optional[str] = ..., daemon_epoch: _Optional[str] = ..., instance_id: _Optional[int] = ..., namespace_ids: _Optional[_Iterable[int]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., planes: _Optional[str] = ..., segment_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("hashes_per_call_max", "leases_per_instance_max", "reservations_per_instance_max", "lease_ms_max", "queue_entries_max", "queue_blocks_max", "session_hints_max", "aliases_per_session_max")
    HASHES_PER_CALL_MAX_FIELD_NUMBER: _ClassVar[int]
    LEASES_PER_INSTANCE_MAX_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_PER_INSTANCE_MAX_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ENTRIES_MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUE_BLOCKS_MAX_FIELD_NUMBER: _ClassVar[int]
    SESSION_HINTS_MAX_FIELD_NUMBER: _ClassVar[int]
    ALIASES_PER_SESSION_MAX_FIELD_NUMBER: _ClassVar[int]
    hashes_per_call_max: int
    leases_per_instance_max: int
    reservations_per_instance_max: int
    lease_ms_max: int
    queue_entries_max: int
    queue_blocks_max: int
    session_hints_max: int
    aliases_per_session_max: int
    def __init__(self, hashes_per_call_max: _Optional[int] = ..., leases_per_instance_max: _Optional[int] = ..., reservations_per_instance_max: _Optional[int] = ..., lease_ms_max: _Optional[int] = ..., queue_entries_max: _Optional[int] = ..., queue_blocks_max: _Optional[int] = ..., session_hints_max: _Optional[int] = ..., aliases_per_session_max: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SegmentsChanged(_message.Message):
    __slots__ = ("added_ids", "retired_ids")
    ADDED_IDS_FIELD_NUMBER: _ClassVar[int]
    RETIRED_IDS_FIELD_NUMBER: _ClassVar[int]
    added_ids: _containers.RepeatedScalarFieldContainer[int]
    retired_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, added_ids: _Optional[_Iterable[int]] = ..., retired_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DrainNotice(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace_id", "hashes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    hashes: bytes
    def __init__(self, namespace_id: _Optional[int] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("hit_blocks", "runs")
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    hit_blocks: int
    runs: _containers.RepeatedCompositeFieldContainer[LookupRun]
    def __init__(self, hit_blocks: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[LookupRun, _Mapping]]] = ...) -> None: ...

class LookupRun(_message.Message):
    __slots__ = ("blocks", "held", "miss", "shift_tokens")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    SHIFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    held: Tier
    miss: MissReason
    shift_tokens: int
    def __init__(self, blocks: _Optional[int] = ..., held: _Optional[_Union[Tier, str]] = ..., miss: _Optional[_Union[MissReason, str]] = ..., shift_tokens: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("namespace_id", "hashes", "session_id", "request_id", "lease_ms", "max_blocks", "attempt_id", "wait_ms", "accepts_shifts", "device")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_SHIFTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    hashes: bytes
    session_id: str
    request_id: str
    lease_ms: int
    max_blocks: int
    attempt_id: int
    wait_ms: int
    accepts_shifts: bool
    device: DeviceBlocks
    def __init__(self, namespace_id: _Optional[int] = ..., hashes: _Optional[bytes] = ..., session_id: _Optional[str] = ..., request_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., max_blocks: _Optional[int] = ..., attempt_id: _Optional[int] = ..., wait_ms: _Optional[int] = ..., accepts_shifts: bool = ..., device: _Optional[_Union[DeviceBlocks, _Mapping]] = ...) -> None: ...

class GetResponse(_message.Message):
    __slots__ = ("lease_id", "lease_ms", "runs")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    lease_ms: int
    runs: _containers.RepeatedCompositeFieldContainer[GetRun]
    def __init__(self, lease_id: _Optional[int] = ..., lease_ms: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[GetRun, _Mapping]]] = ...) -> None: ...

class GetRun(_message.Message):
    __slots__ = ("blocks", "handles", "miss", "shift_tokens")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    SHIFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    handles: Handles
    miss: MissReason
    shift_tokens: int
    def __init__(self, blocks: _Optional[int] = ..., handles: _Optional[_Union[Handles, _Mapping]] = ..., miss: _Optional[_Union[MissReason, str]] = ..., shift_tokens: _Optional[int] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("namespace_id", "hashes", "session_id", "request_id", "attempt_id", "wait_ms", "accepts_shifts", "device")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_SHIFTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    hashes: bytes
    session_id: str
    request_id: str
    attempt_id: int
    wait_ms: int
    accepts_shifts: bool
    device: DeviceBlocks
    def __init__(self, namespace_id: _Optional[int] = ..., hashes: _Optional[bytes] = ..., session_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt_id: _Optional[int] = ..., wait_ms: _Optional[int] = ..., accepts_shifts: bool = ..., device: _Optional[_Union[DeviceBlocks, _Mapping]] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("blocks", "miss", "shift_tokens")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    SHIFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    miss: MissReason
    shift_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, blocks: _Optional[int] = ..., miss: _Optional[_Union[MissReason, str]] = ..., shift_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease_ids", "reservation_ids", "lease_ms")
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_IDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    reservation_ids: _containers.RepeatedScalarFieldContainer[int]
    lease_ms: int
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ..., reservation_ids: _Optional[_Iterable[int]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("lease_ms",)
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    def __init__(self, lease_ms: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_ids", "request_id", "attempt_ids")
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    request_id: str
    attempt_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ..., request_id: _Optional[str] = ..., attempt_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released", "expired")
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    released: int
    expired: int
    def __init__(self, released: _Optional[int] = ..., expired: _Optional[int] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("namespace_id", "parent", "hashes", "session_id", "request_id", "lease_ms", "attempt_id", "device")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    parent: bytes
    hashes: bytes
    session_id: str
    request_id: str
    lease_ms: int
    attempt_id: int
    device: DeviceBlocks
    def __init__(self, namespace_id: _Optional[int] = ..., parent: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., session_id: _Optional[str] = ..., request_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., attempt_id: _Optional[int] = ..., device: _Optional[_Union[DeviceBlocks, _Mapping]] = ...) -> None: ...

class PutResponse(_message.Message):
    __slots__ = ("reservation_id", "lease_ms", "runs")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    lease_ms: int
    runs: _containers.RepeatedCompositeFieldContainer[PutRun]
    def __init__(self, reservation_id: _Optional[int] = ..., lease_ms: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[PutRun, _Mapping]]] = ...) -> None: ...

class PutRun(_message.Message):
    __slots__ = ("blocks", "reserved", "held", "being_written", "refused")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    BEING_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    reserved: Handles
    held: Held
    being_written: BeingWritten
    refused: Refused
    def __init__(self, blocks: _Optional[int] = ..., reserved: _Optional[_Union[Handles, _Mapping]] = ..., held: _Optional[_Union[Held, _Mapping]] = ..., being_written: _Optional[_Union[BeingWritten, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BeingWritten(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: RefusedReason
    def __init__(self, reason: _Optional[_Union[RefusedReason, str]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("reservation_id", "positions")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reservation_id: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[CommitRun]
    def __init__(self, runs: _Optional[_Iterable[_Union[CommitRun, _Mapping]]] = ...) -> None: ...

class CommitRun(_message.Message):
    __slots__ = ("blocks", "published", "awaiting_parent", "dropped")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    AWAITING_PARENT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    published: Published
    awaiting_parent: AwaitingParent
    dropped: DropReason
    def __init__(self, blocks: _Optional[int] = ..., published: _Optional[_Union[Published, _Mapping]] = ..., awaiting_parent: _Optional[_Union[AwaitingParent, _Mapping]] = ..., dropped: _Optional[_Union[DropReason, str]] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AwaitingParent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("reservation_id",)
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    def __init__(self, reservation_id: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("expired",)
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    expired: bool
    def __init__(self, expired: bool = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class TokenRanges(_message.Message):
    __slots__ = ("ranges",)
    RANGES_FIELD_NUMBER: _ClassVar[int]
    ranges: _containers.RepeatedCompositeFieldContainer[TokenRange]
    def __init__(self, ranges: _Optional[_Iterable[_Union[TokenRange, _Mapping]]] = ...) -> None: ...

class TruncateRequest(_message.Message):
    __slots__ = ("namespace_id", "session_id", "source", "ranges", "drop_ratio", "sink_blocks", "hashes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    DROP_RATIO_FIELD_NUMBER: _ClassVar[int]
    SINK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    session_id: str
    source: bytes
    ranges: TokenRanges
    drop_ratio: float
    sink_blocks: int
    hashes: bytes
    def __init__(self, namespace_id: _Optional[int] = ..., session_id: _Optional[str] = ..., source: _Optional[bytes] = ..., ranges: _Optional[_Union[TokenRanges, _Mapping]] = ..., drop_ratio: _Optional[float] = ..., sink_blocks: _Optional[int] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class TruncateResponse(_message.Message):
    __slots__ = ("chain_blocks", "kept_runs", "held_blocks", "miss")
    CHAIN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_RUNS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    chain_blocks: int
    kept_runs: _containers.RepeatedCompositeFieldContainer[KeptRun]
    held_blocks: int
    miss: MissReason
    def __init__(self, chain_blocks: _Optional[int] = ..., kept_runs: _Optional[_Iterable[_Union[KeptRun, _Mapping]]] = ..., held_blocks: _Optional[int] = ..., miss: _Optional[_Union[MissReason, str]] = ...) -> None: ...

class KeptRun(_message.Message):
    __slots__ = ("first_block", "blocks", "new_first_block")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEW_FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    blocks: int
    new_first_block: int
    def __init__(self, first_block: _Optional[int] = ..., blocks: _Optional[int] = ..., new_first_block: _Optional[int] = ...) -> None: ...

class RegisterDeviceRequest(_message.Message):
    __slots__ = ("namespace_id", "device_uuid", "regions", "pieces", "blocks", "unavailable")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    device_uuid: bytes
    regions: _containers.RepeatedCompositeFieldContainer[DeviceRegion]
    pieces: _containers.RepeatedCompositeFieldContainer[DevicePiece]
    blocks: int
    unavailable: str
    def __init__(self, namespace_id: _Optional[int] = ..., device_uuid: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[DeviceRegion, _Mapping]]] = ..., pieces: _Optional[_Iterable[_Union[DevicePiece, _Mapping]]] = ..., blocks: _Optional[int] = ..., unavailable: _Optional[str] = ...) -> None: ...

class DeviceRegion(_message.Message):
    __slots__ = ("ipc_handle", "offset_bytes", "size_bytes")
    IPC_HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ipc_handle: bytes
    offset_bytes: int
    size_bytes: int
    def __init__(self, ipc_handle: _Optional[bytes] = ..., offset_bytes: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class DevicePiece(_message.Message):
    __slots__ = ("region", "offset_bytes", "block_stride_bytes", "size_bytes", "layer")
    REGION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_STRIDE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    region: int
    offset_bytes: int
    block_stride_bytes: int
    size_bytes: int
    layer: int
    def __init__(self, region: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., block_stride_bytes: _Optional[int] = ..., size_bytes: _Optional[int] = ..., layer: _Optional[int] = ...) -> None: ...

class RegisterDeviceResponse(_message.Message):
    __slots__ = ("registration_id", "lanes", "revision")
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    registration_id: int
    lanes: int
    revision: int
    def __init__(self, registration_id: _Optional[int] = ..., lanes: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class UnregisterDeviceRequest(_message.Message):
    __slots__ = ("registration_id",)
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    registration_id: int
    def __init__(self, registration_id: _Optional[int] = ...) -> None: ...

class UnregisterDeviceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeviceBlocks(_message.Message):
    __slots__ = ("registration_id", "block_ids", "packed_block_ids", "lane", "sequence", "first")
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PACKED_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    registration_id: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    packed_block_ids: bytes
    lane: int
    sequence: int
    first: int
    def __init__(self, registration_id: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., packed_block_ids: _Optional[bytes] = ..., lane: _Optional[int] = ..., sequence: _Optional[int] = ..., first: _Optional[int] = ...) -> None: ...

class DeviceStats(_message.Message):
    __slots__ = ("name", "uuid", "state", "registrations", "registered_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REGISTRATIONS_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    uuid: bytes
    state: str
    registrations: int
    registered_bytes: int
    def __init__(self, name: _Optional[str] = ..., uuid: _Optional[bytes] = ..., state: _Optional[str] = ..., registrations: _Optional[int] = ..., registered_bytes: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("namespace_id", "hashes", "session_id", "request_id")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    hashes: bytes
    session_id: str
    request_id: str
    def __init__(self, namespace_id: _Optional[int] = ..., hashes: _Optional[bytes] = ..., session_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[PrefetchRun]
    def __init__(self, runs: _Optional[_Iterable[_Union[PrefetchRun, _Mapping]]] = ...) -> None: ...

class PrefetchRun(_message.Message):
    __slots__ = ("blocks", "held", "started", "miss")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    held: Tier
    started: Started
    miss: MissReason
    def __init__(self, blocks: _Optional[int] = ..., held: _Optional[_Union[Tier, str]] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., miss: _Optional[_Union[MissReason, str]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateQueueRequest(_message.Message):
    __slots__ = ("namespace_id", "epoch", "snapshot", "delta")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    epoch: int
    snapshot: QueueSnapshot
    delta: QueueDelta
    def __init__(self, namespace_id: _Optional[int] = ..., epoch: _Optional[int] = ..., snapshot: _Optional[_Union[QueueSnapshot, _Mapping]] = ..., delta: _Optional[_Union[QueueDelta, _Mapping]] = ...) -> None: ...

class QueueSnapshot(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[QueueEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[QueueEntry, _Mapping]]] = ...) -> None: ...

class QueueDelta(_message.Message):
    __slots__ = ("sequence", "started_ids", "removed_ids", "moves", "additions")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STARTED_IDS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_IDS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    ADDITIONS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    started_ids: _containers.RepeatedScalarFieldContainer[str]
    removed_ids: _containers.RepeatedScalarFieldContainer[str]
    moves: _containers.RepeatedCompositeFieldContainer[QueueMove]
    additions: _containers.RepeatedCompositeFieldContainer[QueueAddition]
    def __init__(self, sequence: _Optional[int] = ..., started_ids: _Optional[_Iterable[str]] = ..., removed_ids: _Optional[_Iterable[str]] = ..., moves: _Optional[_Iterable[_Union[QueueMove, _Mapping]]] = ..., additions: _Optional[_Iterable[_Union[QueueAddition, _Mapping]]] = ...) -> None: ...

class QueueMove(_message.Message):
    __slots__ = ("request_id", "position")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    position: int
    def __init__(self, request_id: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class QueueAddition(_message.Message):
    __slots__ = ("position", "entry")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    position: int
    entry: QueueEntry
    def __init__(self, position: _Optional[int] = ..., entry: _Optional[_Union[QueueEntry, _Mapping]] = ...) -> None: ...

class QueueEntry(_message.Message):
    __slots__ = ("request_id", "session_id", "hashes", "prefix_request_id", "prefix_blocks", "new_tokens", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    session_id: str
    hashes: bytes
    prefix_request_id: str
    prefix_blocks: int
    new_tokens: int
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., session_id: _Optional[str] = ..., hashes: _Optional[bytes] = ..., prefix_request_id: _Optional[str] = ..., prefix_blocks: _Optional[int] = ..., new_tokens: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class UpdateQueueResponse(_message.Message):
    __slots__ = ("outcome", "epoch", "sequence")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    outcome: QueueOutcome
    epoch: int
    sequence: int
    def __init__(self, outcome: _Optional[_Union[QueueOutcome, str]] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class HintSessionsRequest(_message.Message):
    __slots__ = ("namespace_id", "hints")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    hints: _containers.RepeatedCompositeFieldContainer[SessionHint]
    def __init__(self, namespace_id: _Optional[int] = ..., hints: _Optional[_Iterable[_Union[SessionHint, _Mapping]]] = ...) -> None: ...

class SessionHint(_message.Message):
    __slots__ = ("session_id", "resumes_in_ms", "typing", "finished")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESUMES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    TYPING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    resumes_in_ms: int
    typing: Typing
    finished: Finished
    def __init__(self, session_id: _Optional[str] = ..., resumes_in_ms: _Optional[int] = ..., typing: _Optional[_Union[Typing, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Typing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Finished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HintSessionsResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: int
    def __init__(self, known: _Optional[int] = ...) -> None: ...

class PlanLoadRequest(_message.Message):
    __slots__ = ("namespace_id", "hashes", "prefill_tokens_per_s", "copy_bytes_per_s")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COPY_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    hashes: bytes
    prefill_tokens_per_s: float
    copy_bytes_per_s: float
    def __init__(self, namespace_id: _Optional[int] = ..., hashes: _Optional[bytes] = ..., prefill_tokens_per_s: _Optional[float] = ..., copy_bytes_per_s: _Optional[float] = ...) -> None: ...

class PlanLoadResponse(_message.Message):
    __slots__ = ("load_blocks", "hit_blocks", "dram_blocks", "miss", "load_s", "recompute_s")
    LOAD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    load_blocks: int
    hit_blocks: int
    dram_blocks: int
    miss: MissReason
    load_s: float
    recompute_s: float
    def __init__(self, load_blocks: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., dram_blocks: _Optional[int] = ..., miss: _Optional[_Union[MissReason, str]] = ..., load_s: _Optional[float] = ..., recompute_s: _Optional[float] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("namespace_id", "session_id", "whole_namespace")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WHOLE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    session_id: str
    whole_namespace: WholeNamespace
    def __init__(self, namespace_id: _Optional[int] = ..., session_id: _Optional[str] = ..., whole_namespace: _Optional[_Union[WholeNamespace, _Mapping]] = ...) -> None: ...

class WholeNamespace(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ("blocks_dropped", "blocks_in_use")
    BLOCKS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    blocks_dropped: int
    blocks_in_use: int
    def __init__(self, blocks_dropped: _Optional[int] = ..., blocks_in_use: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("daemon_version", "daemon_epoch", "uptime_s", "state", "planes", "instances", "leases", "reservations", "quarantined_slots", "tiers", "namespaces", "attached_instances", "devices")
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    DAEMON_EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    daemon_version: str
    daemon_epoch: str
    uptime_s: float
    state: str
    planes: str
    instances: int
    leases: int
    reservations: int
    quarantined_slots: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    attached_instances: _containers.RepeatedCompositeFieldContainer[InstanceStats]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceStats]
    def __init__(self, daemon_version: _Optional[str] = ..., daemon_epoch: _Optional[str] = ..., uptime_s: _Optional[float] = ..., state: _Optional[str] = ..., planes: _Optional[str] = ..., instances: _Optional[int] = ..., leases: _Optional[int] = ..., reservations: _Optional[int] = ..., quarantined_slots: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., attached_instances: _Optional[_Iterable[_Union[InstanceStats, _Mapping]]] = ..., devices: _Optional[_Iterable[_Union[DeviceStats, _Mapping]]] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "state", "capacity_bytes", "used_bytes", "disks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISKS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    state: str
    capacity_bytes: int
    used_bytes: int
    disks: _containers.RepeatedCompositeFieldContainer[DiskStats]
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., state: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., disks: _Optional[_Iterable[_Union[DiskStats, _Mapping]]] = ...) -> None: ...

class DiskStats(_message.Message):
    __slots__ = ("directory", "state", "why", "capacity_bytes", "used_bytes", "device_bytes", "read_bytes", "read_s", "admitted_bytes", "write_s", "written_bytes", "write_amplification", "checksum_failures", "writes_per_day", "writes_per_day_lately", "transfers")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_S_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_AMPLIFICATION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FAILURES_FIELD_NUMBER: _ClassVar[int]
    WRITES_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    WRITES_PER_DAY_LATELY_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    directory: str
    state: str
    why: str
    capacity_bytes: int
    used_bytes: int
    device_bytes: int
    read_bytes: int
    read_s: float
    admitted_bytes: int
    write_s: float
    written_bytes: int
    write_amplification: float
    checksum_failures: int
    writes_per_day: float
    writes_per_day_lately: float
    transfers: _containers.RepeatedCompositeFieldContainer[TransferDepth]
    def __init__(self, directory: _Optional[str] = ..., state: _Optional[str] = ..., why: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., read_s: _Optional[float] = ..., admitted_bytes: _Optional[int] = ..., write_s: _Optional[float] = ..., written_bytes: _Optional[int] = ..., write_amplification: _Optional[float] = ..., checksum_failures: _Optional[int] = ..., writes_per_day: _Optional[float] = ..., writes_per_day_lately: _Optional[float] = ..., transfers: _Optional[_Iterable[_Union[TransferDepth, _Mapping]]] = ...) -> None: ...

class TransferDepth(_message.Message):
    __slots__ = ("priority", "waiting", "running")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    priority: str
    waiting: int
    running: int
    def __init__(self, priority: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("label", "fingerprint", "tenant", "block_size_bytes", "tokens_per_block", "dram_bytes", "quota_bytes", "blocks", "slots_free", "sessions", "requested_blocks", "dram_hit_blocks", "nvme_hit_blocks", "miss_blocks", "committed_blocks", "evicted_blocks", "policy", "nvme_bytes", "nvme_quota_bytes", "ttl_s", "expired_blocks", "aliases", "shifted_hit_blocks", "queue")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NVME_HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NVME_BYTES_FIELD_NUMBER: _ClassVar[int]
    NVME_QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    SHIFTED_HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    label: str
    fingerprint: bytes
    tenant: str
    block_size_bytes: int
    tokens_per_block: int
    dram_bytes: int
    quota_bytes: int
    blocks: int
    slots_free: int
    sessions: int
    requested_blocks: int
    dram_hit_blocks: int
    nvme_hit_blocks: int
    miss_blocks: int
    committed_blocks: int
    evicted_blocks: int
    policy: str
    nvme_bytes: int
    nvme_quota_bytes: int
    ttl_s: float
    expired_blocks: int
    aliases: int
    shifted_hit_blocks: int
    queue: QueueStats
    def __init__(self, label: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., tenant: _Optional[str] = ..., block_size_bytes: _Optional[int] = ..., tokens_per_block: _Optional[int] = ..., dram_bytes: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., slots_free: _Optional[int] = ..., sessions: _Optional[int] = ..., requested_blocks: _Optional[int] = ..., dram_hit_blocks: _Optional[int] = ..., nvme_hit_blocks: _Optional[int] = ..., miss_blocks: _Optional[int] = ..., committed_blocks: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., policy: _Optional[str] = ..., nvme_bytes: _Optional[int] = ..., nvme_quota_bytes: _Optional[int] = ..., ttl_s: _Optional[float] = ..., expired_blocks: _Optional[int] = ..., aliases: _Optional[int] = ..., shifted_hit_blocks: _Optional[int] = ..., queue: _Optional[_Union[QueueStats, _Mapping]] = ...) -> None: ...

class QueueStats(_message.Message):
    __slots__ = ("requests", "prefetch_window_requests", "eviction_window_requests", "needed_blocks", "dram_blocks")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WINDOW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EVICTION_WINDOW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    prefetch_window_requests: int
    eviction_window_requests: int
    needed_blocks: int
    dram_blocks: int
    def __init__(self, requests: _Optional[int] = ..., prefetch_window_requests: _Optional[int] = ..., eviction_window_requests: _Optional[int] = ..., needed_blocks: _Optional[int] = ..., dram_blocks: _Optional[int] = ...) -> None: ...

class InstanceStats(_message.Message):
    __slots__ = ("instance_id", "name", "tenant", "process_id", "attached_s", "leases", "reservations", "quarantined_slots", "plane", "queued_requests")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_S_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PLANE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    name: str
    tenant: str
    process_id: int
    attached_s: float
    leases: int
    reservations: int
    quarantined_slots: int
    plane: str
    queued_requests: int
    def __init__(self, instance_id: _Optional[int] = ..., name: _Optional[str] = ..., tenant: _Optional[str] = ..., process_id: _Optional[int] = ..., attached_s: _Optional[float] = ..., leases: _Optional[int] = ..., reservations: _Optional[int] = ..., quarantined_slots: _Optional[int] = ..., plane: _Optional[str] = ..., queued_requests: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("hash", "fingerprint")
    HASH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    hash: bytes
    fingerprint: bytes
    def __init__(self, hash: _Optional[bytes] = ..., fingerprint: _Optional[bytes] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanations",)
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    explanations: _containers.RepeatedCompositeFieldContainer[Explanation]
    def __init__(self, explanations: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("label", "fingerprint", "held", "reserved", "dropped", "namespace_mismatch", "not_remembered", "tier_offline")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    NOT_REMEMBERED_FIELD_NUMBER: _ClassVar[int]
    TIER_OFFLINE_FIELD_NUMBER: _ClassVar[int]
    label: str
    fingerprint: bytes
    held: HeldFinding
    reserved: ReservedFinding
    dropped: DroppedFinding
    namespace_mismatch: NamespaceMismatch
    not_remembered: NotRemembered
    tier_offline: TierOffline
    def __init__(self, label: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., held: _Optional[_Union[HeldFinding, _Mapping]] = ..., reserved: _Optional[_Union[ReservedFinding, _Mapping]] = ..., dropped: _Optional[_Union[DroppedFinding, _Mapping]] = ..., namespace_mismatch: _Optional[_Union[NamespaceMismatch, _Mapping]] = ..., not_remembered: _Optional[_Union[NotRemembered, _Mapping]] = ..., tier_offline: _Optional[_Union[TierOffline, _Mapping]] = ...) -> None: ...

class HeldFinding(_message.Message):
    __slots__ = ("tiers", "depth", "children", "idle_s", "uses", "holders", "checksummed")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMMED_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    depth: int
    children: int
    idle_s: float
    uses: int
    holders: int
    checksummed: bool
    def __init__(self, tiers: _Optional[_Iterable[_Union[Tier, str]]] = ..., depth: _Optional[int] = ..., children: _Optional[int] = ..., idle_s: _Optional[float] = ..., uses: _Optional[int] = ..., holders: _Optional[int] = ..., checksummed: bool = ...) -> None: ...

class ReservedFinding(_message.Message):
    __slots__ = ("age_s", "written")
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    age_s: float
    written: bool
    def __init__(self, age_s: _Optional[float] = ..., written: bool = ...) -> None: ...

class DroppedFinding(_message.Message):
    __slots__ = ("reason", "ago_s", "idle_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    AGO_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    reason: DropReason
    ago_s: float
    idle_s: float
    def __init__(self, reason: _Optional[_Union[DropReason, str]] = ..., ago_s: _Optional[float] = ..., idle_s: _Optional[float] = ...) -> None: ...

class NamespaceMismatch(_message.Message):
    __slots__ = ("held_under_labels",)
    HELD_UNDER_LABELS_FIELD_NUMBER: _ClassVar[int]
    held_under_labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, held_under_labels: _Optional[_Iterable[str]] = ...) -> None: ...

class NotRemembered(_message.Message):
    __slots__ = ("history_blocks", "horizon_s")
    HISTORY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HORIZON_S_FIELD_NUMBER: _ClassVar[int]
    history_blocks: int
    horizon_s: float
    def __init__(self, history_blocks: _Optional[int] = ..., horizon_s: _Optional[float] = ...) -> None: ...

class TierOffline(_message.Message):
    __slots__ = ("tier", "why")
    TIER_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    why: str
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., why: _Optional[str] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "message", "field", "retry_after_ms", "error_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_ID_FIELD_NUMBER: _ClassVar[int]
    reason: ErrorReason
    message: str
    field: str
    retry_after_ms: int
    error_id: str
    def __init__(self, reason: _Optional[_Union[ErrorReason, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., error_id: _Optional[str] = ...) -> None: ...

class SocketRequest(_message.Message):
    __slots__ = ("hello", "segment", "call_hello", "device_progress")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    CALL_HELLO_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    hello: SocketHello
    segment: SegmentRequest
    call_hello: CallHello
    device_progress: DeviceProgressRequest
    def __init__(self, hello: _Optional[_Union[SocketHello, _Mapping]] = ..., segment: _Optional[_Union[SegmentRequest, _Mapping]] = ..., call_hello: _Optional[_Union[CallHello, _Mapping]] = ..., device_progress: _Optional[_Union[DeviceProgressRequest, _Mapping]] = ...) -> None: ...

class SocketHello(_message.Message):
    __slots__ = ("protocol_version_min", "protocol_version_max")
    PROTOCOL_VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_MAX_FIELD_NUMBER: _ClassVar[int]
    protocol_version_min: int
    protocol_version_max: int
    def __init__(self, protocol_version_min: _Optional[int] = ..., protocol_version_max: _Optional[int] = ...) -> None: ...

class CallHello(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class SegmentRequest(_message.Message):
    __slots__ = ("segment_id",)
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    segment_id: int
    def __init__(self, segment_id: _Optional[int] = ...) -> None: ...

class DeviceProgressRequest(_message.Message):
    __slots__ = ("registration_id",)
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    registration_id: int
    def __init__(self, registration_id: _Optional[int] = ...) -> None: ...

class SocketResponse(_message.Message):
    __slots__ = ("welcome", "segment", "error", "call_welcome", "device_progress")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CALL_WELCOME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    welcome: SocketWelcome
    segment: SegmentGrant
    error: ErrorDetail
    call_welcome: CallWelcome
    device_progress: DeviceProgressGrant
    def __init__(self, welcome: _Optional[_Union[SocketWelcome, _Mapping]] = ..., segment: _Optional[_Union[SegmentGrant, _Mapping]] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ..., call_welcome: _Optional[_Union[CallWelcome, _Mapping]] = ..., device_progress: _Optional[_Union[DeviceProgressGrant, _Mapping]] = ...) -> None: ...

class DeviceProgressGrant(_message.Message):
    __slots__ = ("registration_id", "size_bytes")
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    registration_id: int
    size_bytes: int
    def __init__(self, registration_id: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class CallWelcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SocketCall(_message.Message):
    __slots__ = ("method", "request", "timeout_ms")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    method: str
    request: bytes
    timeout_ms: int
    def __init__(self, method: _Optional[str] = ..., request: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class SocketAnswer(_message.Message):
    __slots__ = ("response", "error", "last")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    response: bytes
    error: ErrorDetail
    last: bool
    def __init__(self, response: _Optional[bytes] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ..., last: bool = ...) -> None: ...

class SocketWelcome(_message.Message):
    __slots__ = ("token", "daemon_epoch")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DAEMON_EPOCH_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    daemon_epoch: str
    def __init__(self, token: _Optional[bytes] = ..., daemon_epoch: _Optional[str] = ...) -> None: ...

class SegmentGrant(_message.Message):
    __slots__ = ("segment_id", "namespace_id", "size_bytes", "slot_stride_bytes", "slots", "generations_size_bytes")
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_STRIDE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    segment_id: int
    namespace_id: int
    size_bytes: int
    slot_stride_bytes: int
    slots: int
    generations_size_bytes: int
    def __init__(self, segment_id: _Optional[int] = ..., namespace_id: _Optional[int] = ..., size_bytes: _Optional[int] = ..., slot_stride_bytes: _Optional[int] = ..., slots: _Optional[int] = ..., generations_size_bytes: _Optional[int] = ...) -> None: ...
