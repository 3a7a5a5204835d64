"""The cheapest mix of options under every peak: a mixed-integer linear program, solved by SciPy's HiGHS.

One binary variable for each option of each block; exactly one is chosen in each block. The live bytes at the start of a block are
those of the traced unconstrained step, less what earlier blocks save by their options; a block's own peak comes on top. What
a block sends to the host is released one block later, and comes back while the block after it runs its backward pass.
"""

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

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
TIE_BREAK_S_PER_BYTE = 1e-15
"""Of two mixes that cost the same, the one that keeps less; a microsecond for a GiB."""


@dataclass(frozen=True)
class BlockTerm:
    """A block's options, and live bytes at its start in the unconstrained step. `options[0]` keeps everything."""

    path: str
    options: list[Option]
    forward_start: int
    backward_start: int


@dataclass(frozen=True)
class Problem:
    """Blocks in forward order; `head_peak` is the most between the last block's forward and backward pass. Of the bytes
    sent to the host, `hidden_bytes` travel behind the kernels; each one beyond them costs `open_copy_s`, up to `host_limit`."""

    blocks: list[BlockTerm]
    head_peak: int
    hidden_bytes: int
    host_limit: int
    open_copy_s: float
    step_s: float
    """The unconstrained step, to which the search's precision is relative."""


@dataclass(frozen=True)
class Solution:
    chosen: list[Option]
    peak_bytes: int
    """As the program sees it; the whole plan is traced to be sure."""
    extra_s: float


def cheapest(problem: Problem, limit_bytes: int) -> Solution | None:
    """The mix with the least added time whose every peak is within the limit; None where there is none."""
    system = _System(problem)
    costs = [option.extra_s + TIE_BREAK_S_PER_BYTE * option.kept for option in system.options]
    return system.solve(system.costs(costs, 0.0), limit_bytes)


def least_extra_s(problem: Problem, limit_bytes: int) -> float | None:
    """A bound: no mix within the limit adds less time; None where there is none."""
    system = _System(problem)
    return system.bound(system.costs([option.extra_s for option in system.options], 0.0), limit_bytes)


def leanest(problem: Problem) -> Solution | None:
    """The mix with the smallest peak, whatever it costs."""
    system = _System(problem)
    return system.solve(system.costs([1e-3 * option.extra_s for option in system.options], 1.0), None)


class _System:
    """Variables: an option each, in order of the blocks; then the peak in MiB, and the MiB sent to the host beyond what hides."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.options = [option for block in problem.blocks for option in block.options]
        self.starts = np.cumsum([0] + [len(block.options) for block in problem.blocks])
        self.peaks, self.constants = self._peak_rows()
        self.constraints = self._constraints()

    def costs(self, option_costs: list[float], peak_cost: float) -> np.ndarray:
        return np.array([*option_costs, peak_cost, self.problem.open_copy_s * MIB])

    def bound(self, costs: np.ndarray, limit_bytes: int) -> float | None:
        """The optimum of the relaxation."""
        if not self.problem.blocks:
            return 0.0 if self.problem.head_peak <= limit_bytes else None
        relaxed = self._run(costs, self._upper(limit_bytes))
        return None if relaxed is None else float(costs @ relaxed)

    def solve(self, costs: np.ndarray, limit_bytes: int | None) -> Solution | None:
        """Relaxed first; then rounded, where that is good enough; else in whole numbers, first among the options that the
        relaxation uses for blocks of the same kind."""
        if not self.problem.blocks:
            fits = limit_bytes is None or self.problem.head_peak <= limit_bytes
            return Solution([], self.problem.head_peak, 0.0) if fits else None
        upper = self._upper(limit_bytes)
        relaxed = self._run(costs, upper)
        if relaxed is None:
            return None
        good_enough = GAP_PEAK_FRAC * costs[-2] * relaxed[-2] if costs[-2] else GAP_S_FRAC * self.problem.step_s
        gap = good_enough / max(float(costs @ relaxed), good_enough)
        rounded = self._rounded(relaxed, costs, upper)
        if rounded is not None and costs @ rounded <= costs @ relaxed + good_enough:
            return self._solution(rounded)
        found = self._run(costs, np.minimum(upper, self._support(relaxed, upper)), gap)
        if found is None or costs @ found > costs @ relaxed + ENOUGH_OF_KIND * good_enough:
            wider = self._run(costs, upper, gap)
            found = wider if wider is not None and (found is None or costs @ wider < costs @ found) else found
        found = rounded if found is None else found
        return None if found is None else self._solution(found)

    def _run(self, costs: np.ndarray, upper: np.ndarray, gap: float | None = None) -> np.ndarray | None:
        """The best vector; in whole numbers, to a relative `gap`, where one is given."""
        num = len(self.options)
        found = milp(
            costs,
            constraints=self.constraints,
            bounds=Bounds(np.zeros(num + 2), upper),
            integrality=np.array([int(gap is not None)] * num + [0, 0]),
            options={"mip_rel_gap": gap or 0.0, "node_limit": NODE_LIMIT, "time_limit": TIME_LIMIT_S},
        )
        return found.x

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
        to_host = mixes[:, :-2] @ np.array([option.host / MIB for option in self.options])
        mixes[:, -2] = (mixes[:, :-2] @ self.peaks.T + self.constants).max(axis=1)
        mixes[:, -1] = np.maximum(0, to_host - self.problem.hidden_bytes / MIB)
        fits = (mixes[:, -2] <= upper[-2]) & (to_host <= self.problem.host_limit / MIB)
        return mixes[fits][np.argmin(mixes[fits] @ costs)] if fits.any() else None

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
        chosen = [
            block.options[int(np.argmax(x[start : start + len(block.options)]))]
            for block, start in zip(self.problem.blocks, self.starts)
        ]
        open_bytes = max(0, sum(option.host for option in chosen) - self.problem.hidden_bytes)
        extra_s = sum(option.extra_s for option in chosen) + open_bytes * self.problem.open_copy_s
        return Solution(chosen, int(self._peak(chosen)), extra_s)

    def _constraints(self) -> list[LinearConstraint]:
        num = len(self.options)
        one_each = np.zeros((len(self.problem.blocks), num + 2))
        for row, (start, stop) in enumerate(zip(self.starts, self.starts[1:])):
            one_each[row, start:stop] = 1
        columns = np.zeros((len(self.peaks), 2))
        columns[:, 0] = -1
        below_peak = np.hstack([self.peaks, columns])
        to_host = [option.host / MIB for option in self.options]
        hosted = np.array([[*to_host, 0.0, -1.0], [*to_host, 0.0, 0.0]])
        most = np.array([self.problem.hidden_bytes, self.problem.host_limit]) / MIB
        return [
            LinearConstraint(csr_array(one_each), 1, 1),
            LinearConstraint(csr_array(below_peak), -np.inf, -self.constants),
            LinearConstraint(csr_array(hosted), -np.inf, most),
        ]

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

    def _peak(self, chosen: list[Option]) -> float:
        x = np.zeros(len(self.options))
        for block, start, option in zip(self.problem.blocks, self.starts, chosen):
            x[start + block.options.index(option)] = 1
        return float((self.peaks @ x + self.constants).max() * MIB)
