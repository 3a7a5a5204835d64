"""Which case is measured next, so that what is begun ends in time. Nothing here reads a clock."""

from collections.abc import Sequence
from dataclasses import dataclass

FEWEST_ROUNDS = 3
"""A case is begun only where there is time for so many rounds of it, beside those that the cases before it still want."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a case: once, until its first round can begin, and for each round."""

    open_s: float = 0.0
    round_s: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A case as the schedule sees it."""

    cost: Cost
    num_rounds: int = 0
    is_done: bool = False

    @property
    def next_s(self) -> float:
        """Seconds of its next visit."""
        return self.cost.round_s + (0.0 if self.num_rounds else self.cost.open_s)

    @property
    def wanted_s(self) -> float:
        """Seconds until it has the fewest rounds."""
        missing = max(0, FEWEST_ROUNDS - self.num_rounds)
        return missing * self.cost.round_s + (0.0 if self.num_rounds else self.cost.open_s)


def estimates(relative: Sequence[float], known: Sequence[Cost | None], expected: Cost | None = None) -> list[Cost]:
    """What each case costs: as measured, or as the first one measured, times its predicted share of that one's time.

    Setting up does not shrink with the step, and a round lasts about a second however short the step: a share below 1 counts as 1.
    Before anything was measured `expected` holds for all; without it nothing costs anything, so that the first case is begun.
    """
    first = next((number for number, cost in enumerate(known) if cost is not None), None)
    base = (expected or Cost()) if first is None else known[first]
    assert base is not None
    unit = relative[first or 0]

    def scaled(share: float) -> Cost:
        return Cost(max(1.0, share) * base.open_s, max(1.0, share) * base.round_s)

    return [cost or scaled(each / unit) for cost, each in zip(known, relative)]


def next_turn(turns: Sequence[Turn], left_s: float, first_left_s: float = 0.0) -> int | None:
    """The number of the case to visit, in turn; None where nothing that may be begun ends within `left_s`.

    The first case tells the most: for its fewest rounds it has `first_left_s`, where that is more.
    """
    if left_s > 0:
        fitting = [number for number in _admitted(turns, left_s) if turns[number].next_s <= left_s]
        if fitting:
            return min(fitting, key=lambda number: turns[number].num_rounds)
    first = turns[0]
    wanting = not first.is_done and first.num_rounds < FEWEST_ROUNDS
    return 0 if wanting and first_left_s > 0 and first.next_s <= first_left_s else None


def one_more_fits(num_before: int, alone_s: float, beside: Cost, left_s: float) -> bool:
    """Whether one more way of loading can be measured alone, and then it and those before it beside the step."""
    beside_s = beside.open_s + FEWEST_ROUNDS * beside.round_s
    return alone_s + (num_before + 1) * beside_s <= left_s


def _admitted(turns: Sequence[Turn], left_s: float) -> list[int]:
    """Those begun, and as many of the others, in order, as have time for their fewest rounds too."""
    admitted = [number for number, turn in enumerate(turns) if turn.num_rounds and not turn.is_done]
    free_s = left_s - sum(turns[number].wanted_s for number in admitted)
    for number, turn in enumerate(turns):
        if not turn.num_rounds and not turn.is_done and turn.wanted_s <= free_s:
            admitted.append(number)
            free_s -= turn.wanted_s
    return admitted
