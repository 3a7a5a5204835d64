"""The program against all mixes of small problems, counted one by one."""

from itertools import product

import numpy as np
import pytest

from lowmem.planning.options import Option
from lowmem.planning.plan import KEEP_ALL, BlockPolicy
from lowmem.planning.program import BlockTerm, Problem
from lowmem.planning.solve import (
    ENOUGH_OF_KIND,
    GAP_PEAK_FRAC,
    GAP_S_FRAC,
    cheapest,
    leanest,
    least_extra_s,
)
from lowmem.sizes import MIB

STEP_S = 1.0


def random_problem(seed: int, num_blocks: int = 5) -> Problem:
    draw = np.random.default_rng(seed)
    kinds = []
    for _ in range(2):
        kept = int(draw.integers(40, 100)) * MIB
        options = [Option(KEEP_ALL, kept, kept, kept + 10 * MIB, 12 * MIB, 0, 0.0)]
        for number in range(int(draw.integers(1, 4))):
            less = int(kept * draw.uniform(0.1, 0.8))
            host = int(draw.choice([0, less // 2]))
            policy = BlockPolicy(recompute="selective", keep=(number,))
            options.append(
                Option(
                    policy, less, less, kept + 10 * MIB, kept - less + 12 * MIB, host, float(draw.uniform(0.01, 0.1))
                )
            )
        kinds.append(options)
    blocks, live = [], 200 * MIB
    for number in range(num_blocks):
        options = kinds[int(draw.integers(0, 2))]
        blocks.append((f"b{number}", options, live))
        live += options[0].kept
    terms = [
        BlockTerm(
            path,
            options,
            start,
            start + options[0].kept,
            float(draw.uniform(0.0, 0.04)),
            float(draw.uniform(0.0, 0.02)),
        )
        for path, options, start in blocks
    ]
    return Problem(terms, live, 200 * MIB, 1e-3 / MIB, STEP_S)


def peak_of(problem: Problem, chosen: tuple[Option, ...]) -> int:
    """Straight from the definition: forward, backward and head, block by block."""
    saved, returning, peaks = 0, 0, []
    kept_less = [option.kept - block.options[0].kept for block, option in zip(problem.blocks, chosen)]
    for number, (block, option) in enumerate(zip(problem.blocks, chosen)):
        peaks.append(block.forward_start + saved + returning + option.forward_peak)
        peaks.append(block.backward_start + sum(kept_less[: number + 1]) + returning + option.backward_peak)
        saved += option.forward_held - block.options[0].forward_held
        returning = option.host
    return max(*peaks, problem.head_peak + saved + returning)


def seconds_of(problem: Problem, chosen: tuple[Option, ...]) -> float:
    """The options' own, and the waits for the link, one copy after the other: a block's bytes leave by its time, or all wait; and
    come back behind the block after it, or it waits."""
    sent_s, late_s, back_s = 0.0, 0.0, 0.0
    for block, option in zip(problem.blocks, chosen):
        sent_s += option.host * problem.copy_s
        late_s = max(late_s, sent_s - block.leaves_s)
        back_s += max(0.0, option.host * problem.copy_s - block.returns_s)
    return sum(option.extra_s for option in chosen) + late_s + back_s


def all_mixes(problem: Problem) -> list[tuple[int, float]]:
    mixes = product(*(block.options for block in problem.blocks))
    return [
        (peak_of(problem, mix), seconds_of(problem, mix))
        for mix in mixes
        if sum(o.host for o in mix) <= problem.host_limit
    ]


@pytest.mark.parametrize("seed", range(12))
def test_no_mix_within_the_limit_is_noticeably_cheaper(seed: int) -> None:
    problem = random_problem(seed)
    mixes = all_mixes(problem)
    smallest, largest = min(peak for peak, _ in mixes), mixes[0][0]
    for share in (0.05, 0.3, 0.6, 0.95):
        limit = int(smallest + share * (largest - smallest)) + 1
        best_s = min(seconds for peak, seconds in mixes if peak <= limit)
        found = cheapest(problem, limit)
        assert found is not None and found.peak_bytes <= limit
        assert best_s - 1e-9 <= found.extra_s <= best_s + ENOUGH_OF_KIND * GAP_S_FRAC * STEP_S + 1e-9
        assert found.peak_bytes == pytest.approx(peak_of(problem, tuple(found.chosen)), abs=2)
        assert found.extra_s == pytest.approx(seconds_of(problem, tuple(found.chosen)))
        bound = least_extra_s(problem, limit)
        assert bound is not None and bound <= best_s + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_leanest_is_the_smallest_peak_and_less_is_refused(seed: int) -> None:
    problem = random_problem(seed)
    smallest = min(peak for peak, _ in all_mixes(problem))
    found = leanest(problem)
    assert found is not None and smallest <= found.peak_bytes <= smallest * (1 + GAP_PEAK_FRAC) + 2
    assert cheapest(problem, int(0.98 * smallest)) is None


def test_a_network_without_blocks_fits_or_does_not() -> None:
    problem = Problem([], 100 * MIB, 0, 0.0, STEP_S)
    assert cheapest(problem, 100 * MIB) is not None and cheapest(problem, 99 * MIB) is None
    assert least_extra_s(problem, 100 * MIB) == 0.0 and least_extra_s(problem, 99 * MIB) is None


def test_host_memory_is_not_exceeded() -> None:
    problem = random_problem(3)
    none_allowed = Problem(problem.blocks, problem.head_peak, 0, 1e-3 / MIB, STEP_S)
    found = leanest(none_allowed)
    assert found is not None and sum(option.host for option in found.chosen) == 0
