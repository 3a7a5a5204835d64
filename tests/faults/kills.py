"""F1: kill -9 at random instants, a third of them inside a save, and runs that must end as if nothing had happened."""

import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.child import KILL, Fault
from tests.faults.harness import (
    FORKSERVER,
    differing,
    end_state,
    make_photos,
    make_plan_file,
    resume_arguments,
    run,
    start,
    train_arguments,
)

MAX_CALL = 120
"""Calls of the disk over about five saves."""
OVERRIDES = ("schedule.epochs=4",)


@dataclass
class Score:
    """`survived` counts the kills of runs that ended bitwise as the uninterrupted one, with no step between but `lowmem resume`."""

    injected: int = 0
    survived: int = 0
    inside_a_save: int = 0
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def kill_runs(scratch: Path, num_kills: int, kills_per_run: int, seed: int) -> Score:
    """Runs of the tiny recipe that are killed `kills_per_run` times each and resumed each time."""
    photos, plan = make_photos(scratch / "photos"), make_plan_file(scratch / "plan.json")
    reference, seconds = _reference(scratch, photos, plan)
    score, draw = Score(), random.Random(seed)
    while score.injected < num_kills:
        wanted = min(kills_per_run, num_kills - score.injected)
        _one_run(scratch / f"run{score.runs}", photos, plan, reference, seconds, wanted, draw, score)
    return score


def _reference(scratch: Path, photos: Path, plan: Path) -> tuple[dict[str, object], float]:
    """The end of a run that nobody disturbs, and how long it takes once everything is warm."""
    for name in ("warm", "whole"):
        started = time.monotonic()
        assert run(train_arguments(photos, plan, scratch / name, *OVERRIDES), scratch / f"{name}.txt") == 0
        seconds = time.monotonic() - started
    return end_state(scratch / "whole"), seconds


def _one_run(
    out: Path,
    photos: Path,
    plan: Path,
    reference: dict[str, object],
    seconds: float,
    wanted: int,
    draw: random.Random,
    score: Score,
) -> None:
    output = out.with_suffix(".txt")
    train, resume = train_arguments(photos, plan, out, *OVERRIDES), resume_arguments(out)
    kills = inside = 0
    code = None
    while kills < wanted:
        arguments = resume if (out / "recipe.toml").is_file() else train
        in_save = draw.random() < 1 / 3
        child = start(arguments, output, Fault(draw.randint(1, MAX_CALL), KILL) if in_save else None)
        if not in_save:
            child.process.join(draw.uniform(0, seconds))
            child.kill()
        code = child.wait()
        if code == 0 or (FORKSERVER and code != -KILL):  # it was over before the kill, or failed by itself
            break
        kills += 1
        inside += in_save
    if not kills:  # nothing happened to this run
        return
    if code != 0:
        code = run(resume if (out / "recipe.toml").is_file() else train, output)
    problem = f"exit code {code}" if code else ", ".join(differing(reference, end_state(out))[:3])
    score.runs += 1
    score.injected += kills
    score.inside_a_save += inside
    if problem:
        told = output.read_text(encoding="utf-8", errors="replace")[-600:]
        score.failures.append(f"run {score.runs}: {problem}: {told}")
    else:
        score.survived += kills
