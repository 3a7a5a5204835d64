"""The cheapest mix of options under every peak: a mixed-integer linear program, solved by SciPy's HiGHS.

One binary variable for each option of each block; exactly one is chosen in each block. The live bytes at the start of a block are
those of the traced unconstrained step, less what earlier blocks save by their options; a block's own peak comes on top. What
a block sends to the host is released one block later, and comes back while the block after it runs its backward pass; where the
link to the host is too slow for that, the kernels wait, and the mix is charged with it.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from lowmem.planning.options import Option
from lowmem.sizes import MIB

GAP_S_FRAC = 1e-3
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
class BlockTerm:
    """A block's options, and live bytes at its start in the unconstrained step. `options[0]` keeps everything.

    What the block sends to the host has left `leaves_s` after the step began, or the kernels wait for it; it comes back
    behind `returns_s` of kernels, those of the block after it.
    """

    path: str
    options: list[Option]
    forward_start: int
    backward_start: int
    leaves_s: float = 0.0
    returns_s: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Blocks in forward order; `head_peak` is the most between the last block's forward and backward pass. A byte takes `copy_s` on its
    way to the host or back; there is room for `host_limit` of them. `step_s` is the unconstrained step, to which the search's
    precision is relative."""

    blocks: list[BlockTerm]
    head_peak: int
    host_limit: int
    copy_s: float
    step_s: float

    @cached_property
    def system(self) -> "System":
        return System(self)


@dataclass(frozen=True)
class Solution:
    chosen: list[Option]
    peak_bytes: int
    """As the program sees it; the whole plan is traced to be sure."""
    extra_s: float


def cheapest(problem: Problem, limit_bytes: int) -> Solution | None:
    """The mix with the least added time whose every peak is within the limit; None where there is none."""
    system = problem.system
    return system.solve(system.costs(system.seconds + TIE_BREAK_S_PER_BYTE * system.kept, 0.0), limit_bytes)


def least_extra_s(problem: Problem, limit_bytes: int) -> float | None:
    """A bound: no mix within the limit adds less time; None where there is none."""
    system = problem.system
    return system.bound(system.costs(system.seconds, 0.0), limit_bytes)


def leanest(problem: Problem) -> Solution | None:
    """The mix with the smallest peak, whatever it costs."""
    system = problem.system
    return system.solve(system.costs(1e-3 * system.seconds, 1.0), None)


class System:
    """Variables: an option each, in order of the blocks; then the peak in MiB, and the MiB for whose way to the host kernels wait."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.options = [option for block in problem.blocks for option in block.options]
        self.starts = np.cumsum([0] + [len(block.options) for block in problem.blocks])
        self.kept = np.array([option.kept for option in self.options], dtype=float)
        self.to_host = np.array([option.host for option in self.options]) / MIB
        self.seconds = np.array(
            [
                option.extra_s + max(0.0, option.host * problem.copy_s - block.returns_s)
                for block in problem.blocks
                for option in block.options
            ]
        )
        self.peaks, self.constants = self._peak_rows()
        self.queue, self.in_time = self._queue_rows()
        self.constraints = self._constraints() if problem.blocks else None

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
        if rounded is not None and costs @ rounded <= least + ENOUGH_OF_KIND * good_enough:
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
        num, num_sums = len(self.options), self.constraints.A.shape[1] - len(upper)
        found = milp(
            np.concatenate([costs, np.zeros(num_sums)]),
            constraints=self.constraints,
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
            for block, start in zip(self.problem.blocks, self.starts)
        ]
        if prod(map(len, used)) > MAX_ROUNDINGS:
            return None
        mixes = np.zeros((prod(map(len, used)), len(self.options) + 2))
        for number, columns in enumerate(product(*used)):
            mixes[number, columns] = 1
        chosen = mixes[:, :-2]
        mixes[:, -2] = (chosen @ self.peaks.T + self.constants).max(axis=1)
        mixes[:, -1] = self._late(chosen)
        fits = (mixes[:, -2] <= upper[-2]) & (chosen @ self.to_host <= self.problem.host_limit / MIB)
        return mixes[fits][np.argmin(mixes[fits] @ costs)] if fits.any() else None

    def _late(self, chosen: np.ndarray) -> np.ndarray:
        """MiB for which the forward pass of each mix waits. Copies follow one another, so what the last of the late blocks is late by
        is the wait of all."""
        return np.maximum(0, (chosen @ self.queue.T - self.in_time).max(axis=1))

    def _upper(self, limit_bytes: int | None) -> np.ndarray:
        upper = np.ones(len(self.options) + 2)
        upper[-2:] = np.inf if limit_bytes is None else limit_bytes / MIB, self.problem.host_limit / MIB
        return upper

    def _support(self, relaxed: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """1 for options worth trying: used somewhere among the blocks of a kind, or the first and the leanest of a block."""
        used: dict[int, set[int]] = {}
        for block, start in zip(self.problem.blocks, self.starts):
            numbers = {n for n in range(len(block.options)) if relaxed[start + n] > 1e-6}
            used.setdefault(id(block.options), set()).update(numbers)
        allowed = upper.copy()
        for block, start in zip(self.problem.blocks, self.starts):
            leanest_number = min(range(len(block.options)), key=lambda n: block.options[n].kept)
            wanted = used[id(block.options)] | {0, leanest_number}
            allowed[start : start + len(block.options)] = [float(n in wanted) for n in range(len(block.options))]
        return allowed

    def _solution(self, x: np.ndarray) -> Solution:
        numbers = [
            start + int(np.argmax(x[start : start + len(block.options)]))
            for block, start in zip(self.problem.blocks, self.starts)
        ]
        mix = np.zeros((1, len(self.options)))
        mix[0, numbers] = 1
        extra_s = float(self.seconds[numbers].sum() + self._late(mix)[0] * MIB * self.problem.copy_s)
        peak = float((mix @ self.peaks.T + self.constants).max() * MIB)
        return Solution([self.options[number] for number in numbers], int(peak), extra_s)

    def _constraints(self) -> LinearConstraint:
        """All rows. Those of peaks and of the queue sum over all blocks before one, so they are given as differences from the row before
        the last, in variables of their own, which keeps the matrix sparse."""
        num, num_blocks = len(self.options), len(self.problem.blocks)
        one_each = np.zeros((num_blocks, num))
        for row, (start, stop) in enumerate(zip(self.starts, self.starts[1:])):
            one_each[row, start:stop] = 1
        sums = np.vstack([self.peaks, self.queue])
        before = np.vstack([_shifted(self.peaks, 2), _shifted(self.queue, 1)])
        steps = sums - before
        num_sums = len(sums)
        previous = sparse.block_diag([sparse.eye_array(len(self.peaks), k=-2), sparse.eye_array(len(self.queue), k=-1)])
        limits = np.zeros((num_sums, 2))
        limits[: len(self.peaks), 0] = limits[len(self.peaks) :, 1] = -1.0
        rows = sparse.block_array(
            [
                [sparse.csr_array(one_each), None, None],
                [sparse.csr_array(steps), None, previous - sparse.eye_array(num_sums)],
                [None, sparse.csr_array(limits), sparse.eye_array(num_sums)],
                [sparse.csr_array(self.to_host[None]), sparse.csr_array((1, 2)), None],
            ]
        )
        most = np.concatenate(
            [np.ones(num_blocks), np.zeros(num_sums), -self.constants, self.in_time, [self.problem.host_limit / MIB]]
        )
        least = np.concatenate([np.ones(num_blocks), np.zeros(num_sums), np.full(num_sums + 1, -np.inf)])
        return LinearConstraint(rows.tocsr(), least, most)

    def _queue_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """For each block the MiB that it and those before it send, and how many of them have left in time."""
        rows = np.zeros((len(self.problem.blocks), len(self.options)))
        for row, stop in enumerate(self.starts[1:]):
            rows[row, :stop] = self.to_host[:stop]
        seconds = np.array([block.leaves_s for block in self.problem.blocks])
        return rows, seconds / (max(self.problem.copy_s, 1e-15) * MIB)

    def _peak_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Every peak as row @ x + constant, in MiB: each block's forward, each block's backward, the head."""
        blocks, num = self.problem.blocks, len(self.options)
        rows, constants = [], []
        saved_forward, saved_backward = np.zeros(num), np.zeros(num)
        returning = np.zeros(num)
        for block, start in zip(blocks, self.starts):
            own = slice(start, start + len(block.options))
            forward = saved_forward + returning
            forward[own] += [option.forward_peak for option in block.options]
            rows.append(forward)
            constants.append(block.forward_start)
            saved_forward[own] = [option.forward_held - block.options[0].forward_held for option in block.options]
            saved_backward[own] = [option.kept - block.options[0].kept for option in block.options]
            backward = saved_backward + returning
            backward[own] += [option.backward_peak for option in block.options]
            rows.append(backward)
            constants.append(block.backward_start)
            returning = np.zeros(num)
            returning[own] = [option.host for option in block.options]
        rows.append(saved_forward + returning)
        constants.append(self.problem.head_peak)
        return np.array(rows).reshape(len(rows), num) / MIB, np.array(constants) / MIB


def _shifted(rows: np.ndarray, by: int) -> np.ndarray:
    """Each row's place taken by the one `by` rows before it; zeros before the first."""
    return np.vstack([np.zeros((by, rows.shape[1])), rows])[: len(rows)]


def _cheaper(a: np.ndarray | None, b: np.ndarray | None, costs: np.ndarray) -> np.ndarray | None:
    if a is None or b is None:
        return b if a is None else a
    return b if costs @ b < costs @ a else a
