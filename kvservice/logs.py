"""logs: structured logging: one event per line on stderr, a JSON object, or text where a person is watching.

Built on stdlib logging, so that lines of libraries come out in the same form:

    log = event_log(__name__)
    log.info("attached", instance_id=3, tenant="uid:1000")
    {"ts": "2026-01-31T10:00:00.123456+00:00", "level": "info", "logger": "kvservice.server", "event": "attached", ...}
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

VALUE_CHARACTERS_MAX = 16_384
"""A longer text (a traceback, say) loses its middle, so that one event stays one readable line."""

_FIELDS = "kvservice_fields"
_RESERVED = frozenset({"ts", "level", "logger", "event", "exception"})


class EventLog:
    """Writes events with named fields. Values may be anything; bytes are shown in hex, unknown types by their repr.

    A field named like one of the line's own keys (ts, level, logger, event, exception) gets an underscore appended.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **fields: object) -> None:
        """For somebody who follows one request."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        """Something changed that an operator may want to know."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        """Something is wrong and was dealt with."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        """Something is wrong and somebody should look."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, error: BaseException, /, **fields: object) -> None:
        """An error with the traceback of the exception that caused it."""
        self._log(logging.ERROR, event, fields, error=error)

    def _log(self, level: int, event: str, fields: Mapping[str, object], *, error: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            # The event is an argument, not the format: it may contain a percent sign.
            self._logger.log(level, "%s", event, extra={_FIELDS: fields}, exc_info=error)


def event_log(name: str) -> EventLog:
    """The event log of a module; `name` is its `__name__`."""
    return EventLog(name)


def configure(level: str, *, stream: TextIO | None = None) -> None:
    """Send the whole process's log lines of at least `level` (debug, info, warning, error) to `stream` (stderr).

    Text where the stream is a terminal, else JSON. Libraries are heard from "warning" on, or from "debug" on at
    "debug". Replaces what was configured before.
    """
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter() if target.isatty() else JsonFormatter())
    root = logging.getLogger()
    for previous in list(root.handlers):
        root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(LEVELS[level] if level in ("debug", "error") else logging.WARNING)
    logging.getLogger("kvservice").setLevel(LEVELS[level])
    logging.captureWarnings(capture=True)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts (UTC, ISO 8601), level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        line: dict[str, object] = {
            "ts": _when(record).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _plain(record.getMessage()),
        }
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info))
        # ASCII, so that no character counts as the end of a line anywhere, whatever the stream's encoding.
        return json.dumps(line, allow_nan=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, event, key=value. Control characters are escaped; only a traceback takes more lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The text, without its last newline."""
        clock = _when(record).astimezone().strftime("%H:%M:%S.%f")[:-3]
        shown = [f"{name}={_word(value)}" for name, value in _fields(record)]
        line = " ".join([f"{clock} {record.levelname:<7} {_word(record.getMessage(), bare=True)}", *shown])
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def _when(record: logging.LogRecord) -> dt.datetime:
    return dt.datetime.fromtimestamp(record.created, tz=dt.UTC)


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    fields: Mapping[str, object] = getattr(record, _FIELDS, {})
    for name, value in fields.items():
        yield str(_plain(f"{name}_" if name in _RESERVED else name)), _plain(value)


def _plain(value: object) -> object:
    """`value` as JSON can hold it; containers are copied, so that nothing unencodable hides inside."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            # A lone surrogate (from an undecodable path, say) is no character: many JSON readers refuse it.
            return _cut(value.encode(errors="backslashreplace").decode())
        case bytes() | bytearray() | memoryview():
            return _cut(bytes(value).hex())
        case Mapping():
            return {str(_plain(str(key))): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return _plain(repr(value))


def _cut(text: str) -> str:
    if len(text) <= VALUE_CHARACTERS_MAX:
        return text
    half = VALUE_CHARACTERS_MAX // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


def _word(value: object, *, bare: bool = False) -> str:
    """A value on one line: quoted and escaped where it would not read as one word, or not as text at all."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    plain = text.isprintable() and (bare or not isinstance(value, str) or (text and not set(text) & set(' "=')))
    return text if plain else json.dumps(text)
