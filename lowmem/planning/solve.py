"""The cheapest mix of options under every peak: a mixed-integer linear program, solved by SciPy's HiGHS.

One binary variable for each option of each block; exactly one is chosen in each block. The live bytes at the start of a block are
those of the traced unconstrained step, less what earlier blocks save by their options; a block's own peak comes on top. What
a block sends to the host is released one block later, and comes back while the block after it runs its backward pass; where the
link to the host is too slow for that, the kernels wait, and the mix is charged with it.
"""

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from scipy.optimize import Bounds, milp

from lowmem.planning.options import Option
from lowmem.planning.program import Problem
from lowmem.sizes import MIB

GAP_S_FRAC = 5e-4
"""A mix within this share of the step's time of the best one is good enough."""
ENOUGH_OF_KIND = 5
"""A mix of the options that the relaxation uses may miss the relaxation by this many such gaps; else all options are searched."""
GAP_PEAK_FRAC = 5e-3
"""The same for the smallest peak, as a share of it."""
NODE_LIMIT = 300
"""Of the integer search, which makes it stop at the same mix on a busy machine; the time limit is for a machine that hangs."""
TIME_LIMIT_S = 60.0
MAX_ROUNDINGS = 1024
"""Mixes tried in rounding the relaxation, whose optimum is in whole numbers but for a few blocks."""
TIGHTER = (0.995, 0.99)
"""Shares of the limit within which the relaxation is rounded, too."""
TIE_BREAK_S_PER_BYTE = 1e-15
"""Of two mixes that cost the same, the one that keeps less; a microsecond for a GiB."""


@dataclass(frozen=True)
class Solution:
    chosen: list[Option]
    peak_bytes: int
    """As the program sees it; the whole plan is traced to be sure."""
    extra_s: float


def cheapest(problem: Problem, limit_bytes: int) -> Solution | None:
    """The mix with the least added time whose every peak is within the limit; None where there is none."""
    search, rows = _Search(problem), problem.rows
    return search.solve(search.costs(rows.seconds + TIE_BREAK_S_PER_BYTE * rows.kept, 0.0), limit_bytes)


def least_extra_s(problem: Problem, limit_bytes: int) -> float | None:
    """A bound: no mix within the limit adds less time; None where there is none."""
    search, rows = _Search(problem), problem.rows
    return search.bound(search.costs(rows.seconds, 0.0), limit_bytes)


def leanest(problem: Problem) -> Solution | None:
    """The mix with the smallest peak, whatever it costs."""
    search, rows = _Search(problem), problem.rows
    return search.solve(search.costs(1e-3 * rows.seconds, 1.0), None)


class _Search:
    """For the best vector of the variables (see `Rows`) at some costs."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.rows = problem, problem.rows

    def costs(self, option_costs: np.ndarray, peak_cost: float) -> np.ndarray:
        return np.array([*option_costs, peak_cost, self.problem.copy_s * MIB])

    def bound(self, costs: np.ndarray, limit_bytes: int) -> float | None:
        """The optimum of the relaxation."""
        if not self.problem.blocks:
            return 0.0 if self.problem.head_peak <= limit_bytes else None
        relaxed = self._run(costs, self._upper(limit_bytes))
        return None if relaxed is None else float(costs @ relaxed)

    def solve(self, costs: np.ndarray, limit_bytes: int | None) -> Solution | None:
        """Relaxed and rounded first, within the limit or a little less; where that is not good enough, in whole numbers, first
        among the options that the relaxation uses for blocks of the same kind."""
        if not self.problem.blocks:
            fits = limit_bytes is None or self.problem.head_peak <= limit_bytes
            return Solution([], self.problem.head_peak, 0.0) if fits else None
        upper = self._upper(limit_bytes)
        relaxed = self._run(costs, upper)
        if relaxed is None:
            return None
        good_enough = GAP_PEAK_FRAC * costs[-2] * relaxed[-2] if costs[-2] else GAP_S_FRAC * self.problem.step_s
        least = float(costs @ relaxed)
        rounded = self._rounded_near(relaxed, costs, upper, least + good_enough)
        if rounded is not None and costs @ rounded <= least + good_enough:
            return self._solution(rounded)
        gap = good_enough / max(least, good_enough)
        found = self._run(costs, np.minimum(upper, self._support(relaxed, upper)), gap)
        if found is None or costs @ found > least + ENOUGH_OF_KIND * good_enough:
            found = _cheaper(found, self._run(costs, upper, gap), costs)
        found = _cheaper(found, rounded, costs)
        return None if found is None else self._solution(found)

    def _rounded_near(
        self, relaxed: np.ndarray, costs: np.ndarray, upper: np.ndarray, good: float
    ) -> np.ndarray | None:
        """The best of the roundings of the relaxation and of those with a little less room, which often fit where its own do not."""
        best = self._rounded(relaxed, costs, upper)
        for share in TIGHTER if np.isfinite(upper[-2]) else ():
            if best is not None and costs @ best <= good:
                break
            tighter = upper.copy()
            tighter[-2] *= share
            near = self._run(costs, tighter)
            best = best if near is None else _cheaper(best, self._rounded(near, costs, upper), costs)
        return best

    def _run(self, costs: np.ndarray, upper: np.ndarray, gap: float | None = None) -> np.ndarray | None:
        """The best vector; in whole numbers, to a relative `gap`, where one is given."""
        num, num_sums = len(self.rows.options), self.rows.constraints.A.shape[1] - len(upper)
        found = milp(
            np.concatenate([costs, np.zeros(num_sums)]),
            constraints=self.rows.constraints,
            bounds=Bounds(
                np.concatenate([np.zeros(num + 2), np.full(num_sums, -np.inf)]),
                np.concatenate([upper, np.full(num_sums, np.inf)]),
            ),
            integrality=np.array([int(gap is not None)] * num + [0] * (2 + num_sums)),
            options={"mip_rel_gap": gap or 0.0, "node_limit": NODE_LIMIT, "time_limit": TIME_LIMIT_S},
        )
        return None if found.x is None else found.x[: num + 2]

    def _rounded(self, relaxed: np.ndarray, costs: np.ndarray, upper: np.ndarray) -> np.ndarray | None:
        """The best mix in whole numbers that takes each block's option from those that the relaxation gives a share."""
        used = [
            [start + n for n in range(len(block.options)) if relaxed[start + n] > 1e-6]
            for block, start in zip(self.problem.blocks, self.rows.starts)
        ]
        if prod(map(len, used)) > MAX_ROUNDINGS:
            return None
        mixes = np.zeros((prod(map(len, used)), len(self.rows.options) + 2))
        for number, columns in enumerate(product(*used)):
            mixes[number, columns] = 1
        chosen = mixes[:, :-2]
        mixes[:, -2] = (chosen @ self.rows.peaks.T + self.rows.constants).max(axis=1)
        mixes[:, -1] = self._late(chosen)
        fits = (mixes[:, -2] <= upper[-2]) & (chosen @ self.rows.to_host <= self.problem.host_limit / MIB)
        return self._improved(mixes[fits][np.argmin(mixes[fits] @ costs)], costs, upper) if fits.any() else None

    def _improved(self, mix: np.ndarray, costs: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """With one block's option exchanged after the other, as long as that makes it cheaper."""
        block_of = np.repeat(np.arange(len(self.problem.blocks)), np.diff(self.rows.starts))
        while True:
            chosen = np.flatnonzero(mix[:-2])
            taken = chosen[block_of]  # for each option the one that it would replace
            peaks = self.rows.peaks @ mix[:-2] + self.rows.constants
            queue = self.rows.queue @ mix[:-2] - self.rows.in_time
            peak = (peaks[:, None] + self.rows.peaks - self.rows.peaks[:, taken]).max(axis=0)
            late = np.maximum(0, (queue[:, None] + self.rows.queue - self.rows.queue[:, taken]).max(axis=0))
            host = self.rows.to_host @ mix[:-2] + self.rows.to_host - self.rows.to_host[taken]
            change = costs[:-2] - costs[taken] + costs[-2] * (peak - mix[-2]) + costs[-1] * (late - mix[-1])
            change[(peak > upper[-2]) | (host > self.problem.host_limit / MIB)] = np.inf
            best = int(np.argmin(change))
            if change[best] >= -1e-12:
                return mix
            mix = mix.copy()
            mix[taken[best]], mix[best], mix[-2:] = 0.0, 1.0, (peak[best], late[best])

    def _late(self, chosen: np.ndarray) -> np.ndarray:
        """MiB for which the forward pass of each mix waits. Copies follow one another, so what the last of the late blocks is late by
        is the wait of all."""
        return np.maximum(0, (chosen @ self.rows.queue.T - self.rows.in_time).max(axis=1))

    def _upper(self, limit_bytes: int | None) -> np.ndarray:
        upper = np.ones(len(self.rows.options) + 2)
        upper[-2:] = np.inf if limit_bytes is None else limit_bytes / MIB, self.problem.host_limit / MIB
        return upper

    def _support(self, relaxed: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """1 for options worth trying: used somewhere among the blocks of a kind, or the first and the leanest of a block."""
        used: dict[int, set[int]] = {}
        for block, start in zip(self.problem.blocks, self.rows.starts):
            numbers = {n for n in range(len(block.options)) if relaxed[start + n] > 1e-6}
            used.setdefault(id(block.options), set()).update(numbers)
        allowed = upper.copy()
        for block, start in zip(self.problem.blocks, self.rows.starts):
            leanest_number = min(range(len(block.options)), key=lambda n: block.options[n].kept)
            wanted = used[id(block.options)] | {0, leanest_number}
            allowed[start : start + len(block.options)] = [float(n in wanted) for n in range(len(block.options))]
        return allowed

    def _solution(self, x: np.ndarray) -> Solution:
        numbers = [
            start + int(np.argmax(x[start : start + len(block.options)]))
            for block, start in zip(self.problem.blocks, self.rows.starts)
        ]
        mix = np.zeros((1, len(self.rows.options)))
        mix[0, numbers] = 1
        extra_s = float(self.rows.seconds[numbers].sum() + self._late(mix)[0] * MIB * self.problem.copy_s)
        peak = float((mix @ self.rows.peaks.T + self.rows.constants).max() * MIB)
        return Solution([self.rows.options[number] for number in numbers], int(peak), extra_s)


def _cheaper(a: np.ndarray | None, b: np.ndarray | None, costs: np.ndarray) -> np.ndarray | None:
    if a is None or b is None:
        return b if a is None else a
    return b if costs @ b < costs @ a else a
