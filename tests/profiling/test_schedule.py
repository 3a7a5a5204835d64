"""The schedule under a clock that is moved by hand."""

import pytest

from lowmem.profiling.schedule import FEWEST_ROUNDS, Cost, Turn, estimates, next_turn, one_more_fits

EQUAL = [Cost(4.0, 1.0)] * 5


def scheduled(true: list[Cost], budget_s: float, relative: list[float] | None = None, most: int = 25) -> tuple[list[int], float]:
    """(rounds of each case, seconds taken) with costs that are known only once a case was visited."""
    relative = relative or [1.0] * len(true)
    clock, rounds = 0.0, [0] * len(true)
    known: list[Cost | None] = [None] * len(true)
    while True:
        turns = [Turn(cost, n, n >= most) for cost, n in zip(estimates(relative, known), rounds)]
        number = next_turn(turns, budget_s - clock, budget_s - clock)
        if number is None:
            return rounds, clock
        clock += true[number].round_s + (0.0 if rounds[number] else true[number].open_s)
        rounds[number] += 1
        known[number] = true[number]


@pytest.mark.parametrize("budget_s", [6.0, 12.0, 17.0, 33.0, 60.0])
def test_it_ends_in_time_and_no_case_has_fewer_rounds_than_the_fewest(budget_s: float) -> None:
    rounds, took_s = scheduled(EQUAL, budget_s)
    assert took_s <= budget_s
    assert all(n == 0 or n >= FEWEST_ROUNDS for n in rounds[1:])
    assert rounds[0] >= min(FEWEST_ROUNDS, int(budget_s - 4))
    assert rounds == sorted(rounds, reverse=True), "the cases that tell most go first"


def test_a_first_round_of_every_case_would_overrun() -> None:
    budget_s = 12.0
    assert sum(cost.open_s + cost.round_s for cost in EQUAL) > budget_s
    rounds, took_s = scheduled(EQUAL, budget_s)
    assert took_s <= budget_s and rounds[0] and not any(rounds[1:])


def test_a_slow_case_is_left_out_where_the_prediction_tells_and_overruns_where_it_does_not() -> None:
    true = [Cost(4.0, 1.0), Cost(40.0, 10.0), Cost(4.0, 1.0)]
    rounds, took_s = scheduled(true, 30.0, relative=[1.0, 10.0, 1.0])
    assert took_s <= 30 and rounds[1] == 0 and rounds[2] >= FEWEST_ROUNDS
    _, took_s = scheduled(true, 30.0, relative=[1.0, 1.0, 1.0])
    assert took_s > 30, "the prediction is what kept it in time"


def test_with_time_for_all_the_cases_take_turns() -> None:
    rounds, _ = scheduled(EQUAL, 5 * 4.0 + 30.0)
    assert max(rounds) - min(rounds) <= 1
    rounds, took_s = scheduled(EQUAL, 1000.0, most=5)
    assert rounds == [5] * 5 and took_s == 45.0


def test_the_first_case_may_use_the_time_of_later_stages_for_its_fewest_rounds_only() -> None:
    turns = [Turn(Cost(4, 1), 1), Turn(Cost(4, 1), 0)]
    assert next_turn(turns, -1.0, 2.0) == 0 and next_turn(turns, -1.0, 0.5) is None
    assert next_turn([Turn(Cost(4, 1), FEWEST_ROUNDS)], -1.0, 20.0) is None


def test_a_way_of_loading_is_begun_only_with_time_for_it_beside_the_step() -> None:
    beside = Cost(2.0, 1.0)
    assert one_more_fits(0, 5.0, beside, 10.0) and not one_more_fits(0, 5.0, beside, 9.9)
    assert not one_more_fits(1, 5.0, beside, 14.9) and one_more_fits(1, 5.0, beside, 15.0)


def test_before_anything_was_measured_what_is_expected_holds() -> None:
    assert estimates([1.0, 1.0], [None, None], Cost(3, 2)) == [Cost(3, 2)] * 2
    assert estimates([1.0, 2.0, 0.5], [Cost(3, 2), None, None]) == [Cost(3, 2), Cost(6, 4), Cost(3, 2)]
