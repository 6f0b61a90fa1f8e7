"""dialogues: synthetic conversations whose questions can only be answered from what was said before."""

from __future__ import annotations

import random
from dataclasses import dataclass

_OWNERS = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "Jill",
    "Kai",
    "Lena",
    "Max",
    "Nora",
    "Otto",
)
_THINGS = ("boat", "bike", "door", "safe", "room", "desk", "book", "seat", "card", "lock", "lamp", "tent", "van", "key")
_CODE_DIGITS = 4
_QUESTION_SHARE = 0.5
_FILLER_SHARE = 0.35


@dataclass(frozen=True, slots=True)
class Question:
    """Where an answer stands and where what it repeats was said, as byte offsets into the dialogue."""

    fact_start: int
    fact_end: int
    answer_start: int
    answer_end: int


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation as bytes, and its questions in order."""

    text: bytes
    questions: tuple[Question, ...]


def make(*, seed: int, size_bytes: int, filler: bytes, recall_bytes_max: int) -> Dialogue:
    """A conversation of exactly `size_bytes`.

    Args:
        filler: text from which a part of the turns is taken.
        recall_bytes_max: a question asks for a code that was said at most so many bytes before.
    """
    chooser = random.Random(seed)
    text = bytearray()
    said: list[tuple[str, str, int, int]] = []  # (what, code, start, end)
    questions: list[Question] = []
    while len(text) < size_bytes:
        recent = [fact for fact in said if len(text) - fact[2] <= recall_bytes_max]
        if recent and chooser.random() < _QUESTION_SHARE:
            what, code, start, end = chooser.choice(recent)
            text += f"user: What is the code of {what}?\nassistant: It is ".encode()
            questions.append(Question(start, end, len(text), len(text) + len(code)))
            text += f"{code}.\n".encode()
            said = [fact for fact in said if fact[2] != start]
        elif chooser.random() < _FILLER_SHARE:
            start = chooser.randrange(len(filler) - 100)
            text += (
                b"user: "
                + filler[start : start + chooser.randrange(20, 90)].replace(b"\n", b" ")
                + b"\nassistant: I see.\n"
            )
        else:
            what = f"{chooser.choice(_OWNERS)}'s {chooser.choice(_THINGS)}"
            code = "".join(chooser.choice("0123456789") for _ in range(_CODE_DIGITS))
            said = [fact for fact in said if fact[0] != what]
            fact_start = len(text)
            text += f"user: The code of {what} is {code}.\nassistant: Noted.\n".encode()
            said.append((what, code, fact_start, len(text)))
    whole = [question for question in questions if question.answer_end < size_bytes]
    return Dialogue(bytes(text[:size_bytes]), tuple(whole))
