"""The directory of a volume: who has it, where its files are, how many bytes it may take."""

from __future__ import annotations

import fcntl
import os
import re

from kvservice.errors import StartupError

_FREE_SHARE_KEPT = 10  # the last tenth of a file system is never taken
_SEGMENT_NAME = re.compile(r"(\d{8,})\.kv")


def lock(directory: str) -> int:
    """Make the directory if need be, and lock it for this process; the lock's descriptor.

    Raises:
        StartupError: another process has it, or it cannot be used.
    """
    try:
        os.makedirs(os.path.join(directory, "segments"), mode=0o700, exist_ok=True)
        descriptor = os.open(os.path.join(directory, "LOCK"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"cannot use nvme directory {directory}: {error.strerror}; choose another") from error
    return _locked(descriptor, directory, "stop it or choose another nvme directory")


def lock_existing(directory: str) -> int:
    """Lock a directory that a daemon made, changing nothing in it; the lock's descriptor.

    Raises:
        StartupError: it is none, or another process has it.
    """
    try:
        descriptor = os.open(os.path.join(directory, "LOCK"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartupError(
            f"{directory} is no directory of an NVMe tier: {(error.strerror or str(error)).lower()}: LOCK; name one "
            "of the daemon's nvme_dirs"
        ) from error
    return _locked(descriptor, directory, "stop it first, or ask the daemon (kvservice stats)")


def _locked(descriptor: int, directory: str, next_step: str) -> int:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StartupError(f"another process uses {directory}; {next_step}") from None
    return descriptor


def segment_path(directory: str, segment_id: int) -> str:
    """Where a segment's file is."""
    return os.path.join(directory, "segments", f"{segment_id:08}.kv")


def segment_ids(directory: str) -> list[int]:
    """Numbers of the segment files that there are. Raises OSError."""
    found = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(os.path.join(directory, "segments")))
    return sorted(int(match[1]) for match in found if match)


def index_path(directory: str) -> str:
    """Where the journal is."""
    return os.path.join(directory, "index")


def taken_bytes(directory: str) -> int:
    """Bytes of disk that everything in the directory takes. Raises OSError."""
    return sum(
        os.stat(os.path.join(folder, name)).st_blocks * 512 for folder, _, names in os.walk(directory) for name in names
    )


def capacity_bytes(directory: str, asked_bytes: int) -> int:
    """What the directory may take: what was asked for, or half of what is free or ours; never the last tenth."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize + taken_bytes(directory)
    most = max(0, free - status.f_blocks * status.f_frsize // _FREE_SHARE_KEPT)
    return min(asked_bytes or free // 2, most)
