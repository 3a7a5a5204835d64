"""Faults injected and survived, in large counts, and the same faults against a plain training script.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --out benchmarks/results/faults.json

Survived means: no manual step but `lowmem resume`, and in the end every tensor of the checkpoint and of the classifier and every
figure of the epochs bitwise as in a run that nobody disturbed. Anything else counts as a failure and is written down.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Result = dict[str, Any]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/faults.json"))
    options.add_argument("--kills", type=int, default=1000)
    options.add_argument("--damages", type=int, default=10_000)
    options.add_argument(
        "--only", nargs="*", default=[], help="Names of the faults to run again; the others stay as they are."
    )
    chosen = options.parse_args()
    report = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.only and chosen.out.is_file() else {}
    from lowmem.machine import this_machine

    machine = {"machine": this_machine().model_dump()}
    report |= {"command": "OMP_NUM_THREADS=1 python benchmarks/faults.py"} | ({} if chosen.only else machine)
    for name, inject in faults(chosen).items():
        if chosen.only and name not in chosen.only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            result = inject(Path(scratch))
        report[name] = result | {"seconds": round(time.perf_counter() - started, 1)} | (machine if chosen.only else {})
        print(f"{name}: {result['survived']} of {result['injected']} survived", flush=True)
        chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def faults(chosen: argparse.Namespace) -> dict[str, Callable[[Path], Result]]:
    """Each takes an empty folder and gives at least `injected` and `survived`."""
    from tests.faults import control
    from tests.faults.harness import make_photos
    from tests.faults.kills import kill_runs

    def of_control(count: Callable[[Path, Path], Any]) -> Callable[[Path], Result]:
        return lambda scratch: count(scratch / "work", make_photos(scratch / "photos")).as_dict()

    return {
        "F2 disk call": disk_calls,
        "F5 damage": lambda scratch: damages(scratch, chosen.damages),
        "F6 stop and resume": stops,
        "F9 not a number": numbers,
        "F11 hostile images": hostile,
        "F9 not a number, control": of_control(control.not_a_number),
        "F6 stop and resume, control": of_control(control.stops),
        "F5 damage, control": of_control(lambda work, photos: control.damages(work, photos, 200, seed=1)),
        "F1 kill -9, control": of_control(lambda work, photos: control.kills(work, photos, 50, seed=1)),
        "F1 kill -9": lambda scratch: kill_runs(scratch, chosen.kills, kills_per_run=8, seed=1).as_dict(),
    }


def disk_calls(scratch: Path) -> Result:
    """A save cut off before each call of the disk, as a kill and as a power loss with 100 outcomes of what was not flushed."""
    from tests.faults import test_disk_calls as saves
    from tests.faults.model_disk import materialise, power_losses

    draw, found, num_kills = random.Random(2), [], 0
    for num_before in (0, 1, 2):
        template = saves.run_folder(scratch / f"template{num_before}", num_before)
        for number in range(1, len(saves.calls_of_a_save(template, scratch / f"count{num_before}")) + 1):
            root = scratch / f"{num_before}-{number}"
            disk = saves.stopped(template, root, number)
            found.append(_is_whole(saves, root, num_before))
            num_kills += 1
            for index, tree in enumerate(power_losses(disk, draw, 95)):
                materialise(tree, scratch / f"{num_before}-{number}-{index}")
                found.append(_is_whole(saves, scratch / f"{num_before}-{number}-{index}", num_before))
    return {"injected": len(found), "survived": sum(found), "kills": num_kills, "power_losses": len(found) - num_kills}


def _is_whole(saves: Any, root: Path, num_before: int) -> bool:
    from lowmem.errors import LowmemError

    try:
        return saves.epoch_found(root, num_before) in (num_before, 9)
    except (LowmemError, AssertionError):
        return False


def damages(scratch: Path, num: int) -> Result:
    from lowmem.training.checkpoint import Checkpoints
    from tests.faults.damage import damage_checkpoints
    from tests.training.test_checkpoint import checkpoint

    kept = Checkpoints(scratch / "source")
    return damage_checkpoints(scratch / "work", kept.write(checkpoint(1)), kept.write(checkpoint(2)), num, 1).as_dict()


def hostile(scratch: Path) -> Result:
    """Ten collections of damaged, mislabelled and malicious files."""
    from tests.faults.hostile_images import try_files

    scores = []
    for seed in range(10):
        (scratch / str(seed)).mkdir()
        scores.append(try_files(scratch / str(seed), seed).as_dict())
    total = {name: sum(score[name] for score in scores) for name in ("injected", "survived", "named")}
    failures = [failure for score in scores for failure in score["failures"]]
    return total | {"failures": failures, "slowest_s": max(score["slowest_s"] for score in scores)}


def stops(scratch: Path) -> Result:
    """Every step of three epochs, with 0, 2 and 4 loader workers, 1 and 4 accumulation steps."""
    from tests.faults.harness import differing, make_photos
    from tests.faults.stops import EVERY_STEP, EXIT_STOPPED, tiny

    photos, failures, injected = make_photos(scratch / "photos"), [], 0
    for atoms in (1, 4):
        whole = tiny(photos, scratch, f"whole{atoms}", 0, atoms)
        whole.train()
        for workers in (0, 2, 4):
            for at in EVERY_STEP:
                run, steps = tiny(photos, scratch, f"run-{atoms}-{workers}-{at[0]}-{at[1]}", workers, atoms), []
                good = run.train(stop_in=at, seen=steps) == EXIT_STOPPED and run.resume(seen=steps) == 0
                injected += 1
                if not good or steps != EVERY_STEP or differing(whole.end(), run.end()):
                    failures.append(f"step {at}, {workers} workers, {atoms} accumulation steps")
    return {"injected": injected, "survived": injected - len(failures), "failures": failures}


def numbers(scratch: Path) -> Result:
    """NaN and infinity in loss, gradient, weight, statistic and optimizer at each of four steps, and in each epoch's metric."""
    from lowmem.errors import LowmemError
    from tests.faults.harness import differing, make_photos, make_plan_file
    from tests.faults.numbers import INJECTIONS, at_step, in_metric
    from tests.faults.stops import TinyRun

    photos, plan = make_photos(scratch / "photos"), make_plan_file(scratch / "plan.json")
    whole, failures, injected = TinyRun(photos, plan, scratch / "whole"), [], 0
    whole.train()
    for place, inject in INJECTIONS.items():
        for value in (math.nan, math.inf):
            for step in range(4):
                run, told = TinyRun(photos, plan, scratch / f"{place}{value}{step}"), ""
                try:
                    with at_step(inject, value, 2, step):
                        run.train(every="1-steps")
                except LowmemError as error:
                    told = str(error)
                injected += 1
                if "of epoch 2" not in told or run.resume() != 0 or differing(whole.end(), run.end()):
                    failures.append(f"{value} in {place} at step {step}: {told}")
    for epoch in (1, 2, 3):
        for value in (math.nan, math.inf):
            run = TinyRun(photos, plan, scratch / f"metric{epoch}{value}")
            with in_metric(value, epoch):
                run.train()
            injected += 1
            best = max(line for line in (run.out / "events.jsonl").read_text().splitlines() if '"best": true' in line)
            if json.loads(best)["epoch"] == epoch:
                failures.append(f"{value} as the metric of epoch {epoch}")
    return {"injected": injected, "survived": injected - len(failures), "failures": failures}


if __name__ == "__main__":
    main()
