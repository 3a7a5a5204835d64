"""The faults are real: the control script fails where lowmem must not."""

from pathlib import Path

import pytest

from tests.faults import control
from tests.faults.harness import FORKSERVER


@pytest.mark.skipif(not FORKSERVER, reason="each child would import torch again")
def test_kills(photos: Path, tmp_path: Path) -> None:
    score = control.kills(tmp_path, photos, num=3, seed=0)
    assert score.injected == 3 and score.survived < 3


def test_damage(photos: Path, tmp_path: Path) -> None:
    score = control.damages(tmp_path, photos, num=6, seed=0)
    assert score.injected == 6 and score.survived < 6


def test_stops(photos: Path, tmp_path: Path) -> None:
    score = control.stops(tmp_path, photos, every=7)
    assert score.injected == 3 and score.survived == 0


def test_numbers(photos: Path, tmp_path: Path) -> None:
    score = control.not_a_number(tmp_path, photos)
    assert score.outcomes["kept as the best"] >= 1
