"""The rows of the mixed-integer program of solve.py: peaks and the queue to the host, as sums over the options of all blocks.

One binary variable for each option of each block; exactly one is chosen in each block. The live bytes at the start of a block are
those of the traced unconstrained step, less what earlier blocks save by their options; a block's own peak comes on top. What
a block sends to the host is released one block later, and comes back while the block after it runs its backward pass; where the
link to the host is too slow for that, the kernels wait, and the mix is charged with it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.optimize import LinearConstraint

from lowmem.planning.options import Option
from lowmem.sizes import MIB


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
    def rows(self) -> "Rows":
        return Rows(self)


class Rows:
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
