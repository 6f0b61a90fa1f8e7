"""runs: which blocks of the buffer are free, as runs of neighbours. Numbers in, numbers out."""

from __future__ import annotations

import bisect


class Runs:
    """The free runs of `blocks` blocks, numbered from 0: first fit, neighbours merged. Not thread-safe."""

    def __init__(self, blocks: int) -> None:
        """All are free."""
        self.blocks = blocks
        self._firsts = [0] if blocks else []  # of each free run, ascending, and no two touch
        self._ends = [blocks] if blocks else []

    @property
    def free_blocks(self) -> int:
        """How many blocks are free."""
        return sum(self._ends) - sum(self._firsts)

    @property
    def longest(self) -> int:
        """How many blocks the longest free run has."""
        return max((end - first for first, end in zip(self._firsts, self._ends, strict=True)), default=0)

    def allocate(self, blocks: int) -> int | None:
        """Take so many neighbours, at least 1: the first of them; None: no free run is that long."""
        assert blocks >= 1, f"a run of {blocks} blocks"
        for place, first in enumerate(self._firsts):
            if self._ends[place] - first >= blocks:
                self._firsts[place] += blocks
                if self._firsts[place] == self._ends[place]:
                    del self._firsts[place], self._ends[place]
                return first
        return None

    def free(self, first: int, blocks: int) -> None:
        """Give blocks back that were taken."""
        end = first + blocks
        place = bisect.bisect_left(self._firsts, first)
        assert 0 <= first < end <= self.blocks, f"blocks {first} to {end} of {self.blocks}"
        assert place == 0 or self._ends[place - 1] <= first, f"block {first} is free already"
        assert place == len(self._firsts) or end <= self._firsts[place], f"block {end - 1} is free already"
        continues = place > 0 and self._ends[place - 1] == first
        is_continued = place < len(self._firsts) and self._firsts[place] == end
        if continues and is_continued:
            self._ends[place - 1] = self._ends[place]
            del self._firsts[place], self._ends[place]
        elif continues:
            self._ends[place - 1] = end
        elif is_continued:
            self._firsts[place] = first
        else:
            self._firsts.insert(place, first)
            self._ends.insert(place, end)
