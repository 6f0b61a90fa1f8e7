"""sessions: conversations and the ends of their chains.

A session is known by the deepest blocks that its requests stored or read (its *tips*; more than
one when a reply was regenerated). Everything before a tip is part of the conversation, shared or
not. Pure; bounded: the session used longest ago is dropped from the books (its blocks stay).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping

from kvservice.blocks import NO_ROW, Rows

TIPS_PER_SESSION_MAX = 8


def session_key(session_id: str) -> bytes:
    """32 bytes that stand for a session: ids may be long, and need not be kept or written to disk."""
    return hashlib.blake2b(session_id.encode(), digest_size=32).digest()


def owner_of(session: Hashable) -> int:
    """64 bits of a session's key, not 0: the lock on blocks that only this session may use.

    The second lock: the hashes of such blocks are salted with the session already.
    """
    assert isinstance(session, bytes), "sessions are known by their key"
    return int.from_bytes(session[:8], "little") or 1


class Sessions:
    """The sessions of one namespace, by their key."""

    def __init__(self, *, sessions_max: int) -> None:
        self._sessions_max = sessions_max
        self._tips: OrderedDict[Hashable, dict[int, None]] = OrderedDict()
        self._by_tip: dict[int, set[Hashable]] = {}

    def __len__(self) -> int:
        return len(self._tips)

    def extend(self, session: Hashable, chain: Rows, tip: int) -> None:
        """A request of the session used the rows of `chain`, the deepest of which is `tip`."""
        tips = self._tips.setdefault(session, {})
        self._tips.move_to_end(session)
        for old in [old for old in tips if old != tip and old in chain]:
            self._unmark(session, old)
        tips.pop(tip, None)  # the last one used stands last
        tips[tip] = None
        self._by_tip.setdefault(tip, set()).add(session)
        if len(tips) > TIPS_PER_SESSION_MAX:
            self._unmark(session, next(iter(tips)))
        if len(self._tips) > self._sessions_max:
            self.forget(next(iter(self._tips)))

    def row_left(self, row: int, parent: int) -> None:
        """A row left the index: sessions that ended there end at the block before it."""
        for session in self._by_tip.pop(row, ()):
            tips = self._tips[session]
            del tips[row]
            if parent != NO_ROW:
                tips[parent] = None
                self._by_tip.setdefault(parent, set()).add(session)
            elif not tips:
                del self._tips[session]

    def moved(self, rows: Mapping[int, int]) -> None:
        """Every row has another number now."""
        self._by_tip = {rows[tip]: sessions for tip, sessions in self._by_tip.items()}
        for session, tips in self._tips.items():
            self._tips[session] = {rows[tip]: None for tip in tips}

    def forget(self, session: Hashable) -> list[int]:
        """Drop the session from the books; its tips, none if it is unknown."""
        tips = list(self._tips.get(session, ()))
        for tip in tips:
            self._unmark(session, tip)
        self._tips.pop(session, None)
        return tips

    def tips(self, session: Hashable) -> list[int]:
        """The ends of the session's chains, what it used last at the end; none if it is unknown."""
        return list(self._tips.get(session, ()))

    def of_tip(self, row: int) -> Collection[Hashable]:
        """The sessions that end at the row."""
        return self._by_tip.get(row, ())

    def is_tip(self, row: int) -> bool:
        """Whether some session ends at the row."""
        return row in self._by_tip

    def check(self) -> None:
        """Assert that both directions agree. For tests."""
        forward = {(session, tip) for session, tips in self._tips.items() for tip in tips}
        backward = {(session, tip) for tip, sessions in self._by_tip.items() for session in sessions}
        assert forward == backward, f"tips differ: {forward ^ backward}"

    def _unmark(self, session: Hashable, tip: int) -> None:
        del self._tips[session][tip]
        sessions = self._by_tip[tip]
        sessions.discard(session)
        if not sessions:
            del self._by_tip[tip]
