"""daemon: ask the running daemon, and say what to do where none answers."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kvservice_client
from kvservice.cli.failures import NO_DAEMON, CommandFailedError
from kvservice.config import Config

SOCKETS = ("control.sock", "memory.sock")


@contextmanager
def admin(config: Config) -> Iterator[kvservice_client.Admin]:
    """A connection to the daemon of `config.socket_dir` that may ask for stats and explanations.

    Raises:
        CommandFailedError: nobody answers, then or during a call (status 2, with what was tried and what to do), or the
            daemon refused (status 1).
    """
    try:
        with kvservice_client.admin(config.socket_dir) as connection:
            yield connection
    except kvservice_client.DaemonUnreachable as error:
        raise CommandFailedError(unreachable(config, str(error)), status=NO_DAEMON) from error
    except (kvservice_client.Unauthenticated, kvservice_client.PermissionDenied) as error:
        raise CommandFailedError(
            f"the daemon at {config.socket_dir} does not serve uid {os.getuid()}: {error}\n"
            f"  run this as the daemon's user, or start the daemon with --allowed-uids (now {os.getuid()} is missing)"
        ) from error
    except kvservice_client.KVServiceError as error:
        raise CommandFailedError(f"the daemon at {config.socket_dir} refused: {error}") from error


def unreachable(config: Config, reason: str) -> str:
    """What to tell a person where no daemon answers: what was tried, how to start one, where else to look."""
    directory = config.socket_dir
    lines = [f"no daemon answers at {directory} (socket_dir from {config.origin('socket_dir')})"]
    lines += [f"  {line}" for line in _findings(directory)]
    if not reason.startswith("no daemon answers"):  # which the lines above say better
        lines.append(f"  the client says: {reason.splitlines()[0]}")
    lines += [
        f"  start one:      kvservice serve --socket-dir {directory}",
        "  look elsewhere: --socket-dir DIR, or KVSERVICE_SOCKET_DIR",
    ]
    return "\n".join(lines)


def _findings(directory: str) -> list[str]:
    """What is in the socket directory, one line each, with its meaning."""
    try:
        Path(directory).stat()
    except OSError as error:
        return [f"tried {directory}: {(error.strerror or str(error)).lower()}"]
    return [f"tried {path}: {_knock(path)}" for path in (f"{directory}/{name}" for name in SOCKETS)]


def _knock(path: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(path)
        except OSError as error:
            meaning = {
                errno.ENOENT: "no such socket: no daemon was started with this directory",
                errno.ECONNREFUSED: "nobody listens: the daemon died and left the socket; a new one replaces it",
                errno.EACCES: f"permission denied: uid {os.getuid()} may not enter (socket_group lets a group in)",
            }
            return meaning.get(error.errno or 0, (error.strerror or str(error)).lower())
    return "something listens"
