"""benchmarks.multi_turn against a small server of the same protocol: what it sends, measures, and calls a failure."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.multi_turn import Load, Server, drive, generated, main, sharegpt
from benchmarks.multi_turn_report import Report, Turn, percentile
from tests.waiting import eventually

pytestmark = pytest.mark.unit

FIRST_TEXT_AFTER_S = 0.05


class Chat(BaseHTTPRequestHandler):
    """Streams "answer N" for the N-th message; breaks off where the conversation says so."""

    seen: list[dict[str, Any]]
    under_way = most_under_way = 0
    wanted_under_way = 0
    """Nobody is answered before there were so many at once."""
    lock = threading.Lock()

    def do_GET(self) -> None:  # the base class's name
        self._send(200, json.dumps({"data": [{"id": "the-model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Chat.lock:
            Chat.seen.append(body)
            Chat.under_way += 1
            Chat.most_under_way = max(Chat.most_under_way, Chat.under_way)
        time.sleep(FIRST_TEXT_AFTER_S)
        eventually(lambda: Chat.most_under_way >= Chat.wanted_under_way)
        with Chat.lock:
            Chat.under_way -= 1
        last = body["messages"][-1]["content"]
        if "refuse" in last:
            self._send(500, b"no")
            return
        events: list[dict[str, Any]] = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
            {"choices": [{"delta": {"content": f"answer {len(body['messages'])}"}, "finish_reason": None}]},
        ]
        if "break off" not in last:
            events.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 100, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 64}}
        events.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self._send(200, "".join(lines).encode())

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    Chat.seen, Chat.under_way, Chat.most_under_way, Chat.wanted_under_way = [], 0, 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Chat) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{listener.server_port}/v1")
        listener.shutdown()
        thread.join()


def test_every_turn_carries_the_history_with_the_real_answers(server: Server) -> None:
    report = drive(server, Load([["one", "two", "three"]]))
    assert server.model == "the-model"
    assert [body["messages"][-1]["content"] for body in Chat.seen] == ["one", "two", "three"]
    assert [message["content"] for message in Chat.seen[2]["messages"]] == [
        "one",
        "answer 1",
        "two",
        "answer 3",
        "three",
    ]
    assert len({body["session_id"] for body in Chat.seen}) == 1
    assert report.failed == []
    assert [turn.position for turn in report.turns] == [0, 1, 2]
    assert all(turn.ttft_s >= FIRST_TEXT_AFTER_S for turn in report.turns)
    told = report.to_dict()
    assert told["resumed_turns"]["requests"] == 2
    assert (told["resumed_turns"]["computed_tokens"], told["resumed_turns"]["reused_tokens"]) == (72, 128)


@pytest.mark.parametrize("message", ["refuse me", "break off here"])
def test_a_request_without_its_whole_answer_is_a_failure_and_ends_the_conversation(
    server: Server, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = drive(server, Load([["hello", message, "never sent"], ["other"]]))
    assert [turn.error != "" for turn in sorted(report.turns, key=lambda turn: (turn.conversation, turn.position))] == [
        False,
        True,
        False,
    ]
    assert "1 failed" in report.table()
    assert len(Chat.seen) == 3


def test_at_once_bounds_what_is_under_way(server: Server) -> None:
    Chat.wanted_under_way = 2
    drive(server, Load(generated(conversations=4, turns=2, first_words=3, words=2, seed=0), at_once=2))
    assert (len(Chat.seen), Chat.most_under_way) == (8, 2)


def test_generated_conversations_share_no_beginning() -> None:
    made = generated(conversations=5, turns=3, first_words=10, words=2, seed=7)
    assert made == generated(conversations=5, turns=3, first_words=10, words=2, seed=7)
    assert len({messages[0][:4] for messages in made}) == 5
    assert {len(messages) for messages in made} == {3}


def test_sharegpt_files_of_both_shapes_are_read(tmp_path: Path) -> None:
    file = tmp_path / "conversations.json"
    entries = [
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "-"},
                {"from": "human", "value": "b"},
            ]
        },
        {"conversations": []},
        {"messages": [{"role": "system", "content": "-"}, {"role": "user", "content": "c"}]},
    ]
    file.write_text(json.dumps(entries))
    assert sharegpt(file, conversations=9, turns=9) == [["a", "b"], ["c"]]
    assert sharegpt(file, conversations=1, turns=1) == [["a"]]
    file.write_text("[]")
    with pytest.raises(ValueError, match="no conversation"):
        sharegpt(file, conversations=1, turns=1)


def test_the_command_writes_its_report_and_tells_failures(server: Server, tmp_path: Path) -> None:
    dataset, out = tmp_path / "in.json", tmp_path / "out.json"
    url = f"http://{server._host}:{server._port}"
    for message, status in (("fine", 0), ("refuse", 1)):
        dataset.write_text(json.dumps([{"conversations": [{"from": "human", "value": message}]}]))
        assert main(["--url", url, "--dataset", str(dataset), "--json", str(out), "--rate", "0"]) == status
        assert json.loads(out.read_text())["failed"] == status


def test_percentiles_are_values_that_were_measured() -> None:
    values = [0.1, 0.2, 0.3, 0.4]
    assert [percentile(values, fraction) for fraction in (0.5, 0.9, 0.99)] == [0.2, 0.4, 0.4]
    assert percentile([], 0.5) == 0.0
    assert Report([Turn(error="x")], 1.0).resumed == []
