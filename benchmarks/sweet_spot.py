"""Is the sweet spot one? `lowmem profile` is run, and then its choice trains beside the next plan and the next loader on either side.

    python benchmarks/sweet_spot.py --out benchmarks/results/sweet_spot.json

All of them train on the embedded images through the stations of `lowmem bench`, in turn, in one process, for a number of rounds of about a
second that does not depend on the figures. Each is compared with the choice round by round: `times_sweet_spot` is the middle half of these
ratios and their median, `doubt_frac` the half-width of the median's 95 % interval. The choice is confirmed where nothing beside it is quicker
by more than 2 % beyond that doubt. It takes about three minutes.
"""

import argparse
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import psutil
import torch
from rich.console import Console

from lowmem.benchmarking.station import Work
from lowmem.benchmarking.statistics import spread
from lowmem.data.folder import embedded_images, open_dataset
from lowmem.machine import this_machine
from lowmem.planning.plan import Plan
from lowmem.profiling.candidates import loader_name
from lowmem.profiling.command import ProfileRequest, run_profile
from lowmem.profiling.measure import Stations
from lowmem.profiling.result import ProfileFile, load_profile
from lowmem.profiling.sweet_spot import TIE_FRAC, best_plan, loader_neighbours, neighbours

OVERRIDES = ("model.name=test_resnet", "model.weights=none", "data.train_px=96", "batch.size=16")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/sweet_spot.json"))
    options.add_argument("--minutes", type=float, default=1.2)
    options.add_argument("--rounds", type=int, default=7)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "profile"
        run_profile(ProfileRequest(vram="1G", minutes=chosen.minutes, out=folder, overrides=OVERRIDES), Console())
        profile = load_profile(folder)
    rows = trained(profile, chosen.rounds)
    quicker = [name for name, row in rows.items() if row["times_sweet_spot"][1] + row["doubt_frac"] < 1 - TIE_FRAC]
    report = {
        "command": "python " + " ".join(sys.argv),
        "machine": this_machine().model_dump(),
        "recipe": "quickstart",
        "overrides": OVERRIDES,
        "profile_sentences": profile.sentences,
        "profile_seconds": profile.seconds,
        "num_plans_measured": sum(bool(case.rounds_s) for case in profile.plans),
        "num_loaders_measured": sum(bool(case.rounds_s) for case in profile.joint),
        "n": chosen.rounds,
        "rows": rows,
        "quicker_beyond_doubt": quicker,
        "load_average": load_average(),
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1), quicker)


def load_average() -> list[float]:
    """Of one, five and fifteen minutes: what else the machine did."""
    return [round(value, 1) for value in psutil.getloadavg()]


def trained(profile: ProfileFile, rounds: int) -> dict[str, dict[str, object]]:
    dataset = open_dataset(embedded_images().resolve(), profile.recipe.data.val_fraction, profile.recipe.seed)
    seconds: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    cases = sides(profile)
    threads = torch.get_num_threads()
    with closing(Stations(Work(profile.recipe, profile.num_classes, dataset.train), on_card=False)) as stations:
        for plan in cases.values():
            stations.visit(plan)  # opens and warms up
        for _ in range(rounds):
            for name, plan in cases.items():
                visit = stations.visit(plan)
                seconds.setdefault(name, []).append(visit.round.seconds / visit.round.num_steps)
                waits.setdefault(name, []).append(visit.round.wait_data_s / visit.round.seconds)
                peaks[name] = visit.memory.peak_bytes
    torch.set_num_threads(threads)
    extra = {case.loader: case.extra_bytes for case in profile.joint}
    spot = seconds["sweet spot"]
    ratios = {name: spread([own / other for own, other in zip(values, spot)]) for name, values in seconds.items()}
    return {
        name: {
            "times_sweet_spot": [ratios[name].low, ratios[name].median, ratios[name].high],
            "doubt_frac": ratios[name].uncertainty_frac,
            "step_s": spread(values).median,
            "middle_half_s": [spread(values).low, spread(values).high],
            "wait_frac": spread(waits[name]).median,
            "peak_bytes": peaks[name],
            "loading": loader_name(cases[name].loader),
            "loading_bytes": extra.get(cases[name].loader),
        }
        for name, values in seconds.items()
    }


def sides(profile: ProfileFile) -> dict[str, Plan]:
    """The chosen plan, and one step either side of it in its plan and in its loader."""
    assert profile.chosen is not None
    case = best_plan(profile.plans)
    joint = next((each for each in profile.joint if each.loader == profile.chosen.loader), None)
    assert case is not None
    lower, higher = neighbours(case, profile.plans)
    fewer, more = loader_neighbours(joint, profile.joint) if joint else (None, None)
    found = {"sweet spot": profile.chosen}
    for name, other in (("plan one lower", lower), ("plan one higher", higher)):
        if other is not None:
            found[name] = other.plan.model_copy(update={"loader": profile.chosen.loader})
    for name, each in (("loading one lower", fewer), ("loading one higher", more)):
        if each is not None:
            found[name] = profile.chosen.model_copy(update={"loader": each.loader})
    return found


if __name__ == "__main__":
    main()
