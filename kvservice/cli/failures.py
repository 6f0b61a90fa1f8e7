"""failures: how a command ends when it cannot do its work, and the exit statuses."""

FAILED = 1
USAGE = 2
NO_DAEMON = 2
INTERRUPTED = 130


class CommandFailedError(Exception):
    """Ends the command: the text goes to stderr, `status` is the exit status."""

    def __init__(self, message: str, *, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
