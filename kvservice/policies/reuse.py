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
"""Ages reached are counted this often, and worths computed anew when they are next asked for."""

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
        # What is to be added to it: at a range what those add that reached it and the following ones, up to a loss.
        self._gained: Counts = np.zeros((kinds, len(AGES_S) + 1))
        self._second = 0
        self._counted_to = 0
        self._worth = self._worth_of(self.hazards())
        self._is_worth_current = True

    def advance(self, now_s: float) -> int:
        """It is that late now; returns it as a whole second, the unit of all ages."""
        second = int(now_s)
        if second <= self._second:
            return self._second
        if self._counted_to == 0:
            self._counted_to = second
        if second - self._counted_to >= _COUNT_INTERVAL_S:
            self._count(second)
        for begun in range(max(self._second, second - _SECONDS) + 1, second + 1):
            self._waiting[:, begun % _SECONDS] = 0.0
        self._second = second
        return second

    def started(self, kind: int) -> None:
        """An observation of the kind begins now: blocks were used or stored."""
        self._waiting[kind, self._second % _SECONDS] += 1.0

    def ended(self, kind: int, begun_s: int, weight: float) -> None:
        """An observation, or that part of it, which began at that second ends now with a use."""
        age_s = self._second - begun_s
        if begun_s <= 0 or age_s >= _SECONDS - 1:
            return  # before the clock was remembered, or longer ago than it remembers
        ended_in = _range_of(age_s)
        self._used[kind, ended_in] += weight
        self._waiting[kind, begun_s % _SECONDS] -= weight
        # It is not there any more when the ages that it reached since the last count are counted.
        not_counted = bisect.bisect_left(_AGES_S, self._counted_to - begun_s)
        self._gained[kind, not_counted] += weight
        self._gained[kind, ended_in + 1] -= weight

    def worth(self, kind: int, begun_s: int) -> float:
        """Expected uses per second of keeping, of a block of the kind whose last use was at that second."""
        if not self._is_worth_current:
            self._worth = self._worth_of(self.hazards())
            self._is_worth_current = True
        return float(self._worth[kind, _range_of(self._second - begun_s)])

    def hazards(self) -> Counts:
        """The chance of a use in each range of ages for a block that reached it, by kind. Shape (kinds, ranges)."""
        all_reached = self._reached + self._gains()
        whole = (self._used.sum(axis=0) + _PRIOR_USES) / (all_reached.sum(axis=0) + _PRIOR_OBSERVATIONS)
        families = int(self._families.max()) + 1
        used, reached = np.zeros((families, len(AGES_S))), np.zeros((families, len(AGES_S)))
        np.add.at(used, self._families, self._used)
        np.add.at(reached, self._families, all_reached)
        family = (used + _TRUST_OBSERVATIONS * whole) / (reached + _TRUST_OBSERVATIONS)
        kind = (self._used + _TRUST_OBSERVATIONS * family[self._families]) / (all_reached + _TRUST_OBSERVATIONS)
        hazards: Counts = np.minimum(kind, _HAZARD_MAX)
        return hazards

    def _count(self, second: int) -> None:
        """Count the observations that reached the beginning of a range since the last count."""
        forgotten = second - self._second >= _SECONDS
        fading = 0.5 ** ((second - self._counted_to) / _HALF_LIFE_S)
        self._used *= fading
        self._reached = (self._reached + self._gains()) * fading
        self._gained[:] = 0.0
        if not forgotten:
            # Those that began so many seconds ago, for each range, and are remembered.
            begun_s = np.arange(self._counted_to, second) - AGES_S[:, None]
            is_known = (begun_s > self._second - _SECONDS) & (begun_s <= self._second)
            self._reached += (self._waiting[:, begun_s % _SECONDS] * is_known).sum(axis=2)
        self._counted_to = second
        self._is_worth_current = False

    def _gains(self) -> Counts:
        gains: Counts = np.cumsum(self._gained, axis=1)[:, :-1]
        return gains

    @staticmethod
    def _worth_of(hazards: Counts) -> Counts:
        # Of a block that has just come in, by range: the chance that it is unused at the beginning, and the expected
        # time that it is kept from there on. Their differences between two ranges have the ratio that is looked for.
        unused = np.cumprod(np.pad(1.0 - hazards, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
        kept_s = unused[:, :-1] * _WIDTHS_S * (1.0 - hazards / 2)
        left_s = np.pad(np.cumsum(kept_s[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
        used = unused[:, :-1, None] - unused[:, None, 1:]
        during_s = left_s[:, :-1, None] - left_s[:, None, 1:]
        ratios = np.divide(used, during_s, out=np.zeros_like(used), where=np.triu(np.ones(used.shape[1:], dtype=bool)))
        # Rounded, so that what is worth the same in both of two ranges compares as equal.
        worth: Counts = ratios.max(axis=2).astype(np.float32)
        return worth


def _range_of(age_s: int) -> int:
    return bisect.bisect_right(_AGES_S, age_s) - 1
