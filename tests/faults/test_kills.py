"""F1: kill -9. On each push a small count, under the marker `fault` a thousand."""

from pathlib import Path

import pytest

from tests.faults.harness import FORKSERVER
from tests.faults.kills import kill_runs

NUM_KILLS = 30 if FORKSERVER else 4
"""Where a child cannot be forked from a warm server, each one imports torch again."""


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    score = kill_runs(tmp_path, NUM_KILLS, kills_per_run=6, seed=0)
    assert score.failures == [] and score.survived == score.injected == NUM_KILLS
    assert score.inside_a_save >= 1


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_a_thousand_kills(tmp_path: Path) -> None:
    score = kill_runs(tmp_path, 1000, kills_per_run=8, seed=1)
    assert score.failures == [] and score.survived == score.injected == 1000
    assert score.inside_a_save >= 250
