"""multi_turn: drives an OpenAI-compatible server with conversations: `python -m benchmarks.multi_turn --url ...`.

Every conversation sends its whole history with each turn, as chat applications do, and takes the server's real answers
into it. Conversations arrive at a rate, think between turns, and come from a ShareGPT-style file or are generated.
Reports time to first token, prefill tokens computed and reused (what the server says in `usage`), and throughput, as a
table, as JSON and as a plot. Exit status 1 when a request failed.

Covers: load and measuring. Does not cover: starting servers (see docs/vllm.md, and `benchmarks.vllm` for the figures).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.multi_turn_report import Report, Turn, write_plot

_REQUEST_TIMEOUT_S = 300.0
_WORDS = ("time", "river", "stone", "paper", "light", "seven", "green", "often", "under", "music", "table", "cloud")


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        conversations: the users' messages of each conversation, in order.
        arrivals_per_s: conversations that begin per second, at random intervals; 0.0: all at once.
        think_s: between an answer and the next message.
        answer_tokens: of every answer.
        at_once: requests under way at a time, at most; 0: as many as there are.
        is_exact: ask vLLM to go on until so many tokens are there, whatever the model says.
    """

    conversations: Sequence[Sequence[str]]
    arrivals_per_s: float = 0.0
    think_s: float = 0.0
    answer_tokens: int = 32
    at_once: int = 0
    is_exact: bool = True


def generated(*, conversations: int, turns: int, first_words: int, words: int, seed: int) -> list[list[str]]:
    """Conversations of random words: a long first message, shorter ones behind it."""
    source = random.Random(seed)

    def message(length: int) -> str:
        return " ".join(source.choices(_WORDS, k=length))

    # A number of its own in front: no two conversations share their first block.
    return [
        [f"{seed}.{number}. {message(first_words)}", *(message(words) for _ in range(turns - 1))]
        for number in range(conversations)
    ]


def sharegpt(path: Path, *, conversations: int, turns: int) -> list[list[str]]:
    """The users' messages of the first conversations of a ShareGPT-style file.

    A list of {"conversations": [{"from": "human" or "gpt", "value": ...}, ...]}, or of {"messages": [{"role", ...}]}.

    Raises:
        ValueError: there is no conversation with a user's message in it.
    """
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        messages = entry.get("conversations") or entry.get("messages") or []
        users = [
            message.get("value") or message.get("content")
            for message in messages
            if message.get("from", message.get("role")) in {"human", "user"}
        ]
        if users:
            found.append(users[:turns])
        if len(found) == conversations:
            break
    if not found:
        raise ValueError(f"{path} has no conversation with a message of a user")
    return found


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, model: str = "") -> None:
        """Ask it for its model unless one is named. Raises OSError: nobody answers."""
        parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.model = model or self._first_model()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=_REQUEST_TIMEOUT_S)

    def _first_model(self) -> str:
        connection = self._connection()
        try:
            connection.request("GET", f"{self._path}/v1/models")
            return str(json.load(connection.getresponse())["data"][0]["id"])
        finally:
            connection.close()

    def turn(self, messages: list[dict[str, str]], *, session_id: str, load: Load) -> tuple[Turn, str]:
        """One streamed answer: what was measured, and its text. Never raises: a failure is a Turn with an error."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": load.answer_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "session_id": session_id,
        }
        if load.is_exact:
            body |= {"ignore_eos": True, "min_tokens": load.answer_tokens}
        started_s = time.monotonic()
        first_s = 0.0
        text, finish, usage = "", "", dict[str, Any]()
        connection = self._connection()
        try:
            for event in self._events(connection, body):
                if "error" in event:
                    raise http.client.HTTPException(str(event["error"]))  # noqa: TRY301
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    text += choice["delta"].get("content") or ""
                    # The first event only names the role.
                    first_s = first_s or (time.monotonic() if choice["delta"].get("content") else 0.0)
                    finish = choice.get("finish_reason") or finish
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Turn(error=f"{type(error).__name__}: {error}"), text
        finally:
            connection.close()
        if finish not in {"stop", "length"}:
            return Turn(error=f"ended with finish_reason {finish!r}"), text
        ended_s = time.monotonic()
        details = usage.get("prompt_tokens_details") or {}
        return Turn(
            ttft_s=(first_s or ended_s) - started_s,
            seconds=ended_s - started_s,
            prompt_tokens=usage.get("prompt_tokens", 0),
            reused_tokens=details.get("cached_tokens") or 0,
            answer_tokens=usage.get("completion_tokens", 0),
        ), text

    def _events(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        connection.request(
            "POST", f"{self._path}/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"status {response.status}: {response.read(500)!r}")
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                yield json.loads(data)


def drive(server: Server, load: Load, *, seed: int = 0) -> Report:
    """Hold all conversations. Blocks until the last has ended; a failed turn ends its conversation."""
    source = random.Random(seed)
    lock = threading.Lock()
    places = threading.Semaphore(load.at_once or len(load.conversations))
    turns: list[Turn] = []

    def converse(number: int, messages: Sequence[str]) -> None:
        history: list[dict[str, str]] = []
        for position, message in enumerate(messages):
            history.append({"role": "user", "content": message})
            with places:
                turn, text = server.turn(history, session_id=f"multi-turn {seed}.{number}", load=load)
            with lock:
                turns.append(turn.at(number, position, since_s=time.monotonic() - started_s))
            if turn.error:
                return
            history.append({"role": "assistant", "content": text})
            if position + 1 < len(messages):
                time.sleep(load.think_s)

    started_s = time.monotonic()
    threads = []
    for number, messages in enumerate(load.conversations):
        threads.append(threading.Thread(target=converse, args=(number, messages)))
        threads[-1].start()
        if load.arrivals_per_s:
            time.sleep(source.expovariate(load.arrivals_per_s))
    for thread in threads:
        thread.join()
    return Report(turns, time.monotonic() - started_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    options = _parser().parse_args(arguments)
    if options.dataset:
        conversations = sharegpt(options.dataset, conversations=options.conversations, turns=options.turns)
    else:
        conversations = generated(
            conversations=options.conversations,
            turns=options.turns,
            first_words=options.first_words,
            words=options.words,
            seed=options.seed,
        )
    load = Load(
        conversations,
        arrivals_per_s=options.rate,
        think_s=options.think_s,
        answer_tokens=options.answer_tokens,
        at_once=options.at_once,
        is_exact=not options.natural,
    )
    report = drive(Server(options.url, options.model), load, seed=options.seed)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if options.plot:
        try:
            write_plot(report, options.plot)
        except ImportError:
            print('no plot: matplotlib is not installed (pip install "kvservice[bench]")', file=sys.stderr)
    return 1 if report.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.multi_turn", description="Hold conversations with an OpenAI-compatible server."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", default="", help="default: the server's first")
    parser.add_argument("--dataset", type=Path, help="ShareGPT-style JSON; without it conversations are generated")
    parser.add_argument("--conversations", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=5, help="of a conversation, at most; default: %(default)s")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second; 0: all at once; default: 1")
    parser.add_argument("--think-s", type=float, default=1.0, help="pause between turns; default: %(default)s")
    parser.add_argument("--at-once", type=int, default=0, help="requests under way, at most; 0: any number")
    parser.add_argument("--first-words", type=int, default=400, help="of a generated first message; default: 400")
    parser.add_argument("--words", type=int, default=20, help="of further generated messages; default: 20")
    parser.add_argument("--answer-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--natural", action="store_true", help="answers may end early; for servers that are not vLLM")
    parser.add_argument("--seed", type=int, default=0, help="other conversations, sessions and arrivals")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--plot", type=Path, help="write a PNG there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
