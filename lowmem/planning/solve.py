"""The cheapest mix of options under every peak: a mixed-integer linear program, solved by SciPy's HiGHS.

One binary variable for each option of each block; exactly one is chosen in each block. The live bytes at the start of a block are
those of the traced unconstrained step, less what earlier blocks save by their options; a block's own peak comes on top. What
a block sends to the host is released one block later, and comes back while the block after it runs its backward pass.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from lowmem.planning.options import Option
from lowmem.sizes import MIB

GAP = 1e-4
TIME_LIMIT_S = 3.0
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
    """Blocks in forward order; `head_peak` is the most between the last block's forward and backward pass."""

    blocks: list[BlockTerm]
    head_peak: int
    host_limit: int


@dataclass(frozen=True)
class Solution:
    chosen: list[Option]
    peak_bytes: int
    """As the program sees it; the whole plan is traced to be sure."""
    extra_s: float


def cheapest(problem: Problem, limit_bytes: int) -> Solution | None:
    """The mix with the least added time whose every peak is within the limit; None where there is none."""
    system = _System(problem)
    costs = np.array([option.extra_s + TIE_BREAK_S_PER_BYTE * option.kept for option in system.options] + [0.0])
    return system.solve(costs, limit_bytes)


def leanest(problem: Problem) -> Solution | None:
    """The mix with the smallest peak, whatever it costs."""
    system = _System(problem)
    costs = np.array([1e-3 * option.extra_s for option in system.options] + [1.0])
    return system.solve(costs, None)


class _System:
    """Variables: an option each, in order of the blocks, and the peak in MiB."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.options = [option for block in problem.blocks for option in block.options]
        self.starts = np.cumsum([0] + [len(block.options) for block in problem.blocks])
        self.peaks, self.constants = self._peak_rows()

    def solve(self, costs: np.ndarray, limit_bytes: int | None) -> Solution | None:
        if not self.problem.blocks:
            fits = limit_bytes is None or self.problem.head_peak <= limit_bytes
            return Solution([], self.problem.head_peak, 0.0) if fits else None
        num = len(self.options)
        most = np.inf if limit_bytes is None else limit_bytes / MIB
        found = milp(
            costs, constraints=self._constraints(), integrality=np.array([1] * num + [0]),
            bounds=Bounds(np.zeros(num + 1), np.array([1.0] * num + [most])),
            options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
        )
        if found.x is None:
            return None
        chosen = [
            block.options[int(np.argmax(found.x[start : start + len(block.options)]))]
            for block, start in zip(self.problem.blocks, self.starts)
        ]
        return Solution(chosen, int(self._peak(chosen)), sum(option.extra_s for option in chosen))

    def _constraints(self) -> list[LinearConstraint]:
        num = len(self.options)
        one_each = np.zeros((len(self.problem.blocks), num + 1))
        for row, (start, stop) in enumerate(zip(self.starts, self.starts[1:])):
            one_each[row, start:stop] = 1
        below_peak = np.hstack([self.peaks, -np.ones((len(self.peaks), 1))])
        host = np.array([[option.host / MIB for option in self.options] + [0.0]])
        return [
            LinearConstraint(csr_array(one_each), 1, 1),
            LinearConstraint(vstack([csr_array(below_peak)]), -np.inf, -self.constants),
            LinearConstraint(csr_array(host), -np.inf, self.problem.host_limit / MIB),
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
