"""One event is one line of JSON whatever is in it; people get text; libraries are heard from warnings on."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice import logs
from kvservice.logs import EventLog, event_log

pytestmark = pytest.mark.unit


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("kvservice")
    handlers, root_level, our_level = list(root.handlers), root.level, ours.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(root_level)
    ours.setLevel(our_level)


def written(log_something: object, *, level: str = "debug") -> list[dict[str, object]]:
    """The lines that came out, parsed, when `log_something` was called with a log of the room "room"."""
    assert callable(log_something)
    stream = io.StringIO()
    logs.configure(level, stream=stream)
    log_something(event_log("kvservice.room"))
    assert stream.getvalue() == "" or stream.getvalue().endswith("\n")
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_carries_time_level_logger_event_and_fields_in_that_order() -> None:
    before = dt.datetime.now(tz=dt.UTC)
    (line,) = written(lambda log: log.info("attached", instance_id=3, tenant="uid:1000"))
    assert list(line) == ["ts", "level", "logger", "event", "instance_id", "tenant"]
    assert (line["level"], line["logger"], line["event"]) == ("info", "kvservice.room", "attached")
    assert (line["instance_id"], line["tenant"]) == (3, "uid:1000")
    when = dt.datetime.fromisoformat(str(line["ts"]))
    assert before <= when <= dt.datetime.now(tz=dt.UTC)


@pytest.mark.parametrize(("level", "heard"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_the_least_important_line_written(level: str, heard: int) -> None:
    def log_all(log: EventLog) -> None:
        log.debug("event")
        log.info("event")
        log.warning("event")
        log.error("event")

    lines = written(log_all, level=level)
    assert [line["level"] for line in lines] == ["debug", "info", "warning", "error"][-heard:]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.builds(object),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(event=st.text(), values=st.dictionaries(st.text(), VALUES, max_size=3))
def test_any_event_with_any_values_is_one_line_of_json(event: str, values: dict[str, object]) -> None:
    (line,) = written(lambda log: log.info(event, **values))
    assert {"ts", "level", "logger", "event"} <= set(line)


def test_values_are_written_as_a_program_can_read_them() -> None:
    (line,) = written(
        lambda log: log.info(
            "100 % full", token=b"\x00\xff", path=Path("/run"), hashes={"a": (b"\x01",)}, ratio=math.nan, name="\ud800"
        )
    )
    assert line["event"] == "100 % full"
    assert line["token"] == "00ff"
    assert line["path"] == repr(Path("/run"))
    assert line["hashes"] == {"a": ["01"]}
    assert line["ratio"] == "nan"
    assert line["name"] == "\\ud800"


def test_a_field_cannot_pass_for_a_part_of_the_line() -> None:
    (line,) = written(lambda log: log.info("real", level="error", event="forged", ts="never"))
    assert (line["event"], line["level"]) == ("real", "info")
    assert (line["event_"], line["level_"], line["ts_"]) == ("forged", "error", "never")


def test_an_exception_brings_its_traceback_on_the_same_line() -> None:
    def fail(events: EventLog) -> None:
        try:
            int("no number")
        except ValueError as error:
            events.exception("call failed", error, method="Get")  # not a stdlib logger

    (line,) = written(fail)
    assert (line["level"], line["method"]) == ("error", "Get")
    assert "Traceback" in str(line["exception"])
    assert "in fail" in str(line["exception"])


def test_long_values_lose_their_middle() -> None:
    (line,) = written(lambda log: log.info("event", text="a" * 50_000 + "b"))
    text = str(line["text"])
    assert len(text) < logs.VALUE_CHARACTERS_MAX + 100
    assert text.startswith("aaa")
    assert text.endswith("ab")
    assert f"{50_001 - logs.VALUE_CHARACTERS_MAX} characters left out" in text


def test_libraries_and_warnings_come_out_in_the_same_form_from_warnings_on() -> None:
    def let_others_log(_: EventLog) -> None:
        logging.getLogger("grpc").info("chatter")
        logging.getLogger("grpc").warning("%s is wrong", "something")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(capture=True)
            warnings.warn("old", DeprecationWarning, stacklevel=1)

    first, second = written(let_others_log, level="info")
    assert (first["logger"], first["event"]) == ("grpc", "something is wrong")
    assert second["logger"] == "py.warnings"


def test_configuring_again_replaces_the_first_stream() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.configure("info", stream=first)
    logs.configure("info", stream=second)
    event_log("kvservice.room").info("event")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_a_terminal_gets_text_that_no_value_can_break() -> None:
    stream = Terminal()
    logs.configure("info", stream=stream)
    event_log("kvservice.room").info(
        "ready", path="/run/kv", label="two words", evil="\x1b[2J\nINFO forged", ids=[1, 2]
    )
    (line,) = stream.getvalue().splitlines()
    assert "INFO    ready path=/run/kv" in line
    assert 'label="two words"' in line
    assert "\\u001b[2J\\nINFO forged" in line
    assert "ids=[1, 2]" in line


def test_a_terminal_gets_the_traceback_below_the_line() -> None:
    stream = Terminal()
    logs.configure("info", stream=stream)
    event_log("kvservice.room").exception("failed", ValueError("why"))
    assert stream.getvalue().splitlines()[0].endswith("ERROR   failed")
    assert stream.getvalue().splitlines()[-1] == "ValueError: why"
