"""Phases by a clock and by a card's events that are set by hand, and of real steps."""

from collections import deque

import pytest
import torch

from lowmem.phases import CudaClock, HostClock, current_phase, phase, timing_phases
from tests.memory.memory_helpers import (
    differing,
    make_engine,
    make_plan,
    make_recipe,
    policies,
    run_steps,
    state_of,
)


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


def a_step(hands: Hands) -> None:
    with phase("waiting"):
        hands.pass_s(1)
    with phase("step"):
        hands.pass_s(0.25)
        with phase("forward"):
            hands.pass_s(2)
        with phase("backward"):
            hands.pass_s(3)
            with phase("recomputation"):
                hands.pass_s(4)
            hands.pass_s(5)


def test_what_runs_inside_is_taken_off() -> None:
    hands = Hands()
    clock = HostClock(hands)
    with timing_phases(clock):
        a_step(hands)
        assert current_phase() == "other"
        a_step(hands)
        hands.pass_s(7)
        seconds, steps_s = clock.take()
    assert seconds == {"other": 7, "waiting": 2, "step": 0.5, "forward": 4, "backward": 16, "recomputation": 8}
    assert steps_s == [14.25, 14.25]
    assert sum(seconds.values()) == hands.now
    a_step(hands)
    assert clock.take()[1] == [], "a closed clock sees nothing"


def test_an_error_leaves_the_phase() -> None:
    hands = Hands()
    clock = HostClock(hands)
    with timing_phases(clock), pytest.raises(RuntimeError), phase("step"):
        hands.pass_s(1)
        raise RuntimeError
    assert current_phase() == "other" and clock.take()[1] == [1.0]


class Card:
    """A card that runs behind the host: events are passed when `catch_up` says so; each takes its time when recorded."""

    def __init__(self, hands: Hands) -> None:
        self.hands, self.waiting, self.made = hands, deque(), 0

    def event(self) -> "Event":
        self.made += 1
        return Event(self)

    def catch_up(self) -> None:
        while self.waiting:
            self.waiting.popleft().passed = True


class Event:
    def __init__(self, card: Card) -> None:
        self.card, self.passed, self.when = card, False, 0.0

    def record(self, stream: object) -> None:
        self.passed, self.when = False, self.card.hands.now
        self.card.waiting.append(self)

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.card.catch_up()

    def elapsed_time(self, other: "Event") -> float:
        assert self.passed and other.passed, "an event that is not passed has no time"
        return 1000 * (other.when - self.when)


def test_events_are_read_once_the_card_has_passed_them_and_used_again() -> None:
    hands = Hands()
    card = Card(hands)
    clock = CudaClock(torch.device("cuda:0"), card.event, lambda device: None)
    with timing_phases(clock):
        for number in range(400):
            a_step(hands)
            if number % 40 == 0:
                card.catch_up()
        seconds, steps_s = clock.take()
    assert seconds["recomputation"] == pytest.approx(1600) and seconds["waiting"] == pytest.approx(400)
    assert len(steps_s) == 400 and steps_s[7] == pytest.approx(14.25)
    assert sum(seconds.values()) == pytest.approx(hands.now)
    assert card.made < 1600, "events are used again: 400 steps mark 4800 times"


@pytest.mark.parametrize(("kind", "recomputes"), [("none", False), ("full", True), ("dropped", True), ("offload", False)])
def test_recomputation_is_told_from_the_backward_pass(kind: str, recomputes: bool) -> None:
    engine = make_engine(make_recipe("test_resnet"), make_plan(blocks=policies("test_resnet", kind)))
    clock = HostClock()
    with timing_phases(clock):
        run_steps(engine, [0, 1])
        seconds, steps_s = clock.take()
    assert len(steps_s) == 2 and all(seconds[name] > 0 for name in ("copy", "forward", "backward", "optimizer"))
    assert (seconds["recomputation"] > 0) == recomputes


@pytest.mark.parametrize("kind", ["none", "full", "selective_offload"])
def test_timing_changes_no_bit(kind: str) -> None:
    states = []
    for timed, seed in ((False, 0), (True, 0), (True, 1)):
        recipe = make_recipe("test_resnet", dropout=0.3).model_copy(update={"seed": seed})
        engine = make_engine(recipe, make_plan(blocks=policies("test_resnet", kind)))
        with timing_phases(HostClock()) if timed else phase("other"):
            run_steps(engine, range(3))
        states.append(state_of(engine))
        engine.close()
    assert not differing(states[0], states[1])
    assert differing(states[1], states[2]), "another seed gives another classifier"


@pytest.mark.cuda
def test_phases_of_a_card_add_up_without_a_wait_in_the_step() -> None:
    device = torch.device("cuda:0")
    engine = make_engine(
        make_recipe("test_resnet", px=128), make_plan(device="cuda:0", blocks=policies("test_resnet", "full"))
    )
    run_steps(engine, [0])
    clock = CudaClock(device)
    with timing_phases(clock):
        run_steps(engine, range(4))
        seconds, steps_s = clock.take()
    assert len(steps_s) == 4
    assert all(seconds[name] > 0 for name in ("copy", "forward", "recomputation", "backward", "optimizer"))
    assert sum(steps_s) <= sum(seconds.values()) * 1.001
