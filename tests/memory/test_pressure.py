"""Thrashing is named, once, and nothing else is."""

from pathlib import Path

import pytest
import torch

from lowmem.memory.pressure import Diagnosis, PressureWatch, Reading, SystemReader, diagnosis, stalled_frac
from lowmem.sizes import GIB, MIB

CALM = {"host_total_bytes": 16 * GIB, "host_available_bytes": 8 * GIB}
USUAL_S = 0.1


def found(
    latest_s: float = USUAL_S, usual_s: float | None = USUAL_S, budget: int | None = None, **changes: object
) -> str:
    result = diagnosis(Reading(**(CALM | changes)), latest_s, usual_s, budget)
    return result.cause if result else ""


CARD = {"card_total_bytes": 8 * GIB, "card_free_bytes": 4 * GIB, "own_card_bytes": 3 * GIB}


@pytest.mark.parametrize(
    ("cause", "case"),
    [
        ("host_swapping", {"latest_s": 0.2, "swap_bytes_s": 50 * MIB}),
        ("host_stalled", {"latest_s": 0.2, "stalled_frac": 0.3}),
        ("card_full", {"latest_s": 0.2, **CARD, "card_free_bytes": 40 * MIB}),
        ("host_full", {"host_available_bytes": 100 * MIB}),
        ("over_budget", {"budget": 2 * GIB, **CARD}),
        # Negative controls: one sign without the other, or too little of either.
        ("", {}),
        ("", {"latest_s": 1.0}),
        ("", {"latest_s": 1.0, "swap_bytes_s": 1 * MIB, "stalled_frac": 0.05}),
        ("", {"latest_s": 1.0, **CARD}),
        ("", {"swap_bytes_s": 500 * MIB, "stalled_frac": 0.9}),
        ("", {"latest_s": 0.14, "swap_bytes_s": 500 * MIB}),
        ("", {**CARD, "card_free_bytes": 0}),
        ("", {"latest_s": 9.0, "usual_s": None, "swap_bytes_s": 500 * MIB}),
        ("", {"budget": 3 * GIB, **CARD}),
        ("", {"budget": 2 * GIB, **CARD, "own_card_bytes": None}),
        ("", {"host_available_bytes": 1 * GIB}),
    ],
)
def test_a_cause_needs_its_signs(cause: str, case: dict) -> None:
    assert found(**case) == cause


def test_the_text_says_what_and_what_to_do() -> None:
    told = diagnosis(Reading(**CALM, swap_bytes_s=50 * MIB), 0.3, 0.1, None)
    assert told is not None
    assert (
        "3.0 times their usual 100 ms" in told.text
        and "50.0 MiB a second" in told.text
        and "lowmem resume" in told.text
    )


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(readings: list[Reading], steps_s: list[float]) -> tuple[list[Diagnosis], int]:
    """What is told over steps of these lengths, and how often the system was asked."""
    clock, told, asked = Clock(), [], [0]

    def read() -> Reading:
        asked[0] += 1
        return readings[min(asked[0], len(readings)) - 1]

    watch = PressureWatch(read, told.append, every_s=5.0, clock=clock)
    for seconds in steps_s:
        clock.now += seconds
        watch.step()
    return told, asked[0]


def test_a_cause_is_told_once_and_another_one_too() -> None:
    swapping, stalled = Reading(**CALM, swap_bytes_s=50 * MIB), Reading(**CALM, stalled_frac=0.5)
    told, asked = watched([Reading(**CALM), swapping, swapping, stalled], [0.1] * 60 + [0.5] * 60)
    assert [item.cause for item in told] == ["host_swapping", "host_stalled"]
    assert asked == 7, "the system is asked every few seconds, not every step"


def test_an_evaluation_is_no_slow_step_and_steady_steps_are_never_slow() -> None:
    swapping = [Reading(**CALM, swap_bytes_s=500 * MIB)]
    assert watched(swapping, [0.1] * 500)[0] == []
    clock, told = Clock(), []
    watch = PressureWatch(lambda: swapping[0], told.append, every_s=1.0, clock=clock)
    for _ in range(30):
        for _ in range(10):
            clock.now += 0.1
            watch.step()
        clock.now += 60
        watch.pause()
    assert told == []


def test_this_computer_can_be_read() -> None:
    reading = SystemReader(torch.device("cpu"))()
    assert 0 < reading.host_available_bytes <= reading.host_total_bytes and reading.swap_bytes_s >= 0
    assert reading.card_total_bytes is None and (reading.stalled_frac is None or 0 <= reading.stalled_frac <= 1)


def test_pressure_stall_information_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=1\nfull avg10=0.00\n")
    assert stalled_frac(tmp_path / "memory") == 0.125
    (tmp_path / "memory").write_text("nonsense")
    assert stalled_frac(tmp_path / "memory") is None and stalled_frac(tmp_path / "missing") is None


@pytest.mark.cuda
def test_a_card_can_be_read() -> None:
    kept = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    reading = SystemReader(torch.device("cuda:0"))()
    assert reading.card_total_bytes and reading.card_free_bytes is not None
    assert reading.card_free_bytes <= reading.card_total_bytes - kept.nbytes
