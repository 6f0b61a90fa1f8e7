"""The directory of the Unix sockets: its permissions, and the lock that makes the daemon the only one."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import stat

from kvservice.errors import StartupError

CONTROL_SOCKET = "control.sock"
MEMORY_SOCKET = "memory.sock"
_LOCK_FILE = "daemon.lock"
_BINDING = ".binding"
_SUN_PATH_MAX = 107


class SocketDirectory:
    """Owns the directory while the daemon runs."""

    def __init__(self, path: str, *, group: str) -> None:
        """Create or check the directory, and lock it.

        Args:
            group: name or number that may enter (0750); empty: the owner only (0700).

        Raises:
            StartupError: not writable, not ours, too long for a socket, or another daemon has it.
        """
        self.path = os.path.abspath(path)
        self.mode = 0o660 if group else 0o600
        if len(os.path.join(self.path, CONTROL_SOCKET)) > _SUN_PATH_MAX:
            raise StartupError(f"socket_dir {self.path} is too long for a Unix socket; choose a shorter one")
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self._require_ours()
            self._group_id = _group_id(group) if group else -1
            os.chown(self.path, -1, self._group_id)
            os.chmod(self.path, 0o750 if group else 0o700)
            self._lock = os.open(os.path.join(self.path, _LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(
                f"cannot use socket_dir {self.path}: {error.strerror}; choose one that this user may write"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StartupError(f"another daemon serves {self.path}; stop it or choose another socket_dir") from None
        self._published: dict[str, os.stat_result] = {}
        for old in (self.control, self.memory, self.binding):
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(old)
            except OSError as error:
                raise StartupError(
                    f"cannot remove {old}: {error.strerror}; remove it, or choose another socket_dir"
                ) from error

    @property
    def control(self) -> str:
        """Path of the gRPC socket."""
        return os.path.join(self.path, CONTROL_SOCKET)

    @property
    def memory(self) -> str:
        """Path of the socket that passes descriptors."""
        return os.path.join(self.path, MEMORY_SOCKET)

    @property
    def binding(self) -> str:
        """Path to bind a socket at, for `publish`.

        gRPC removes what is at the path that it bound when it stops, whoever's that is by then.
        """
        return os.path.join(self.path, _BINDING)

    def publish(self, socket_path: str) -> None:
        """Give the socket bound at `binding` the configured mode and group, and its name."""
        os.chown(self.binding, -1, self._group_id)
        os.chmod(self.binding, self.mode)
        os.rename(self.binding, socket_path)
        self._published[socket_path] = os.lstat(socket_path)

    @property
    def why_unreachable(self) -> str:
        """What keeps processes that are not connected yet from finding this daemon; empty: nothing. For any thread."""
        lost = [path for path in list(self._published) if not self._is_ours(path)]
        return (
            f"{' and '.join(lost)} was removed or replaced: nobody new can attach; restart the daemon" if lost else ""
        )

    def close(self) -> None:
        """Remove the sockets and unlock. What is in their place by now, if the directory was made anew, stays."""
        for path in self._published:
            if self._is_ours(path):
                os.unlink(path)
        os.close(self._lock)

    def _is_ours(self, path: str) -> bool:
        try:
            return os.path.samestat(os.lstat(path), self._published[path])
        except OSError:
            return False

    def _require_ours(self) -> None:
        status = os.stat(self.path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StartupError(
                f"socket_dir {self.path} belongs to uid {status.st_uid}, this daemon is uid {os.geteuid()}: "
                "whoever owns the directory could replace the sockets; choose a directory of this user"
            )


def _group_id(group: str) -> int:
    if group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise StartupError(f"socket_group {group!r} is not a group of this system") from None
