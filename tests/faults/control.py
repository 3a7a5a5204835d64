"""The faults F1, F5, F6 and F9 put into the control script, counted as for lowmem: survived means that a resume needs no manual step
and ends with the weights of an uninterrupted run."""

import math
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowmem.verification import same_bits
from tests.faults import control_script
from tests.faults.harness import _context

EPOCHS = 4
STEPS_PER_EPOCH = 4


@dataclass
class Score:
    injected: int = 0
    survived: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, object]:
        return vars(self) | {"outcomes": dict(self.outcomes)}

    def count(self, outcome: str) -> None:
        self.injected += 1
        self.outcomes[outcome] += 1
        self.survived += outcome == "survived"


def kills(scratch: Path, photos: Path, num: int, seed: int) -> Score:
    """F1: one kill at a random instant of a run, or inside a save in a third of them, and one resume."""
    reference, draw, score = _whole(scratch, photos), random.Random(seed), Score()
    seconds = _seconds(scratch, photos)
    while score.injected < num:
        out = scratch / f"kill{score.injected}"
        shutil.rmtree(out, ignore_errors=True)
        in_save = draw.random() < 1 / 3
        child = _context().Process(target=_child, args=(str(photos), str(out), draw.randint(1, 16) if in_save else 0))
        child.start()
        if not in_save:
            child.join(draw.uniform(0.5 * seconds, seconds))
            child.kill()
        child.join()
        if child.exitcode == 0:
            continue
        score.count(_outcome(photos, out, reference))
    return score


def damages(scratch: Path, photos: Path, num: int, seed: int) -> Score:
    """F5: a bit of the only checkpoint is flipped, or its end is cut off, in the middle of a run."""
    reference, draw, score = _whole_by_epochs(scratch, photos), random.Random(seed), Score()
    file = scratch / "half" / control_script.LAST
    torch.set_num_threads(1)
    control_script.main(str(photos), str(scratch / "half"), epochs=2)
    good = file.read_bytes()
    for number in range(num):
        out = scratch / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        data = bytearray(good)
        if number % 4 == 3:
            data = data[: draw.randrange(len(data))]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (out / control_script.LAST).write_bytes(data)
        score.count(_outcome(photos, out, reference))
    return score


def stops(scratch: Path, photos: Path, every: int = 1) -> Score:
    """F6: stopped after every step, or after every few."""
    reference, score = _whole(scratch, photos), Score()
    for step in range(1, EPOCHS * STEPS_PER_EPOCH + 1, every):
        out = scratch / f"stop{step}"
        control_script.main(str(photos), str(out), EPOCHS, stop_after=step)
        score.count(_outcome(photos, out, reference))
    return score


def not_a_number(scratch: Path, photos: Path) -> Score:
    """F9: a metric of NaN or infinity in each epoch; survived means that it is not kept as the best."""
    score = Score()
    for epoch in range(EPOCHS):
        for value in (math.nan, math.inf):
            out = scratch / f"nan{epoch}{value}"
            found = control_script.main(
                str(photos), str(out), EPOCHS, poison=lambda e, metric, at=epoch, v=value: v if e == at else metric
            )
            score.count("survived" if math.isfinite(found["best_metric"]) else "kept as the best")
    return score


def _outcome(photos: Path, out: Path, reference: dict[str, Any]) -> str:
    try:
        found = control_script.main(str(photos), str(out), EPOCHS)
    except Exception as error:  # whatever a damaged file provokes in torch.load
        return f"cannot be resumed: {type(error).__name__}"
    equal = all(same_bits(reference[name], found[name]) for name in reference if name != "best_metric")
    return "survived" if equal else "other weights, and nobody is told"


def _whole(scratch: Path, photos: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    shutil.rmtree(scratch / "whole", ignore_errors=True)
    return control_script.main(str(photos), str(scratch / "whole"), EPOCHS)


def _whole_by_epochs(scratch: Path, photos: Path) -> dict[str, Any]:
    """Damage is judged on its own: the reference too was stopped after the second epoch and continued."""
    control_script.main(str(photos), str(scratch / "halves"), epochs=2)
    return control_script.main(str(photos), str(scratch / "halves"), EPOCHS)


def _seconds(scratch: Path, photos: Path) -> float:
    for name in ("warm", "timed"):
        started = time.monotonic()
        child = _context().Process(target=_child, args=(str(photos), str(scratch / name), 0))
        child.start()
        child.join()
        seconds = time.monotonic() - started
    return seconds


def _child(photos: str, out: str, kill_in_save: int) -> None:
    torch.set_num_threads(1)
    if kill_in_save:
        _kill_inside_save(kill_in_save)
    control_script.main(photos, out, EPOCHS)


def _kill_inside_save(number: int) -> None:
    """The process dies when the `number`-th save has written half of its file."""
    save, count = torch.save, [0]

    def dying(state: Any, path: Path) -> None:
        save(state, path)
        count[0] += 1
        if count[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    torch.save = dying
