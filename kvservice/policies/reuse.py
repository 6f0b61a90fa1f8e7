"""reuse: how soon blocks of a kind are used again, learned from every use, and what that makes them worth.

For each kind of block and each age the model counts how many blocks reached the age unused and how many were used at
it: the hazard of an age is their ratio (Kaplan and Meier 1958: a block whose next use is still open counts for the
ages that it reached). All blocks of a kind that one request used count as one observation: they are used together.

What a block is worth is its Gittins index (1979): the best ratio, over all times that one might go on keeping it, of
the chance of a use to the time for which it is kept then. While nothing is known the hazard is taken to be the same in
every range of ages, so that the index falls with age and the order is that of the last use.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_HALF_LIFE_S = 1800.0
"""Observations lose half of their weight in this time: workloads drift."""

_COUNT_INTERVAL_S = 10
"""Ages reached are counted, and worths computed, this often."""

_TRUST_OBSERVATIONS = 4.0
"""With fewer observations a kind is taken to be more like its family than like itself, and a family like all blocks."""

_PRIOR_USES, _PRIOR_OBSERVATIONS = 0.05, 1.0
"""What is supposed to have been seen of all blocks, at every age, before anything was."""

_HAZARD_MAX = 0.95

AGES_S = np.array([0, 1, *(age for octave in range(1, 13) for age in (1 << octave, 3 << octave - 1))], dtype=np.int64)
"""Where ranges of ages begin; two to an octave, the last one from 6,144 s on."""

_AGES_S = AGES_S.tolist()

_WIDTHS_S = np.diff(np.append(AGES_S, 2 * AGES_S[-1])).astype(np.float64)

_SECONDS = 8192
"""Uses are remembered by the second for this long: longer than the last range's beginning."""

Counts = NDArray[np.float64]


class ReuseModel:
    """The hazards of each kind of block, and the worth that follows from them."""

    def __init__(self, families: Sequence[int]) -> None:
        """Args:
        families: for each kind the family of similar kinds that it learns from while little of it was seen.
        """
        kinds = len(families)
        self._families = np.array(families)
        self._waiting: Counts = np.zeros((kinds, _SECONDS))  # observations still open, by the second of their start
        self._used: Counts = np.zeros((kinds, len(AGES_S)))
        self._reached: Counts = np.zeros((kinds, len(AGES_S)))
        self._second = 0
        self._counted_to = 0
        self._worth = self._worth_of(self.hazards())

    def advance(self, now_s: float) -> int:
        """It is that late now; returns it as a whole second, the unit of all ages."""
        second = int(now_s)
        if second <= self._second:
            return self._second
        if self._counted_to == 0:
            self._counted_to = second
        if second - self._counted_to >= _COUNT_INTERVAL_S:
            self._count(second)
        begun = min(second - self._second, _SECONDS)
        self._waiting[:, np.arange(second - begun + 1, second + 1) % _SECONDS] = 0.0
        self._second = second
        return second

    def started(self, kinds: NDArray[np.int64]) -> None:
        """An observation of each of these distinct kinds begins now: blocks were used or stored."""
        self._waiting[kinds, self._second % _SECONDS] += 1.0

    def ended(self, kinds: NDArray[np.uint8], begun_s: NDArray[np.int64], weights: Counts) -> None:
        """Observations, or parts of them, that began at those seconds end now with a use."""
        ages = self._second - begun_s
        # What began before the clock was remembered, or longer ago than it remembers, is past telling.
        is_known = (ages < _SECONDS - 1) & (begun_s > 0)
        kinds, begun_s, weights, ages = kinds[is_known], begun_s[is_known], weights[is_known], ages[is_known]
        np.add.at(self._used, (kinds, _range_of(ages)), weights)
        np.subtract.at(self._waiting, (kinds, begun_s % _SECONDS), weights)
        # They are not there any more when the ages that they reached since the last count are counted.
        is_reached = (ages[:, None] >= AGES_S) & (begun_s[:, None] + AGES_S >= self._counted_to)
        which, ranges = np.nonzero(is_reached)
        np.add.at(self._reached, (kinds[which], ranges), weights[which])

    def worth(self, kind: int, begun_s: int) -> float:
        """Expected uses per second of keeping, of a block of the kind whose last use was at that second."""
        return float(self._worth[kind, bisect.bisect_right(_AGES_S, self._second - begun_s) - 1])

    def hazards(self) -> Counts:
        """The chance of a use in each range of ages for a block that reached it, by kind. Shape (kinds, ranges)."""
        whole = (self._used.sum(axis=0) + _PRIOR_USES) / (self._reached.sum(axis=0) + _PRIOR_OBSERVATIONS)
        families = int(self._families.max()) + 1
        used, reached = np.zeros((families, len(AGES_S))), np.zeros((families, len(AGES_S)))
        np.add.at(used, self._families, self._used)
        np.add.at(reached, self._families, self._reached)
        family = (used + _TRUST_OBSERVATIONS * whole) / (reached + _TRUST_OBSERVATIONS)
        kind = (self._used + _TRUST_OBSERVATIONS * family[self._families]) / (self._reached + _TRUST_OBSERVATIONS)
        hazards: Counts = np.minimum(kind, _HAZARD_MAX)
        return hazards

    def _count(self, second: int) -> None:
        """Count the observations that reached the beginning of a range since the last count."""
        forgotten = second - self._second >= _SECONDS
        fading = 0.5 ** ((second - self._counted_to) / _HALF_LIFE_S)
        self._used *= fading
        self._reached *= fading
        for at, age_s in enumerate(AGES_S.tolist()):
            first = max(self._counted_to - age_s, self._second - _SECONDS + 1)
            last = min(second - 1 - age_s, self._second)
            if first <= last and not forgotten:
                self._reached[:, at] += self._waiting[:, np.arange(first, last + 1) % _SECONDS].sum(axis=1)
        self._counted_to = second
        self._worth = self._worth_of(self.hazards())

    @staticmethod
    def _worth_of(hazards: Counts) -> Counts:
        worth = np.zeros_like(hazards)
        for at in range(len(AGES_S)):
            unused = np.cumprod(1.0 - hazards[:, at:], axis=1)
            entered = np.concatenate([np.ones((len(hazards), 1)), unused[:, :-1]], axis=1)
            kept_s = np.cumsum(entered * _WIDTHS_S[at:] * (1.0 - hazards[:, at:] / 2), axis=1)
            worth[:, at] = np.max((1.0 - unused) / kept_s, axis=1)
        return worth


def _range_of(ages_s: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(AGES_S, ages_s, side="right") - 1
