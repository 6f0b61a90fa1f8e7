"""user_turns: what the users of the demo say: seeded sentences through a tokenizer, or seeded random ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_SEED = 7
_SUBJECTS = ("The engineer", "My neighbour", "A cache", "The committee", "Our ship", "The old library", "That theorem")
_VERBS = ("remembers", "forgets", "measures", "explains", "moves", "repairs", "questions", "describes")
_OBJECTS = ("the harbour", "a broken clock", "every answer", "the second draft", "its own past", "the long corridor")
_ENDINGS = ("before winter.", "without a word.", "twice a day.", "in great detail.", "and asks why?", "once more.")


def sentences(seed: int, count: int) -> str:
    """Text of `count` sentences, the same for the same seed."""
    draw = random.Random(seed)  # noqa: S311 - a demo's small talk is no secret
    return " ".join(
        " ".join(draw.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)) for _ in range(count)
    )


def make_turns(
    lengths_tokens: Sequence[int],
    conversations: int,
    *,
    vocabulary: int,
    tokenize: Callable[[str], list[int]] | None,
) -> list[list[list[int]]]:
    """Token ids of every user turn, by conversation and turn.

    Args:
        lengths_tokens: How long each turn of a conversation is.
        conversations: How many conversations; no two say the same.
        vocabulary: Ids below this are drawn where there is no tokenizer.
        tokenize: From text to ids; None: random ids.
    """
    return [
        [
            _turn_ids(_SEED + 1000 * conversation + turn, length, vocabulary, tokenize)
            for turn, length in enumerate(lengths_tokens)
        ]
        for conversation in range(conversations)
    ]


def _turn_ids(seed: int, length: int, vocabulary: int, tokenize: Callable[[str], list[int]] | None) -> list[int]:
    if tokenize is None:
        draw = random.Random(seed)  # noqa: S311 - see above
        return [draw.randrange(vocabulary) for _ in range(length)]
    # No tokenizer makes fewer tokens than sentences.
    return tokenize(sentences(seed, length))[:length]
