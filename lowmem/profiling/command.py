"""From what the user typed to a profile folder: profile.json, plan.json, figures, report.html."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from lowmem.benchmarking.station import Work
from lowmem.data.folder import Dataset
from lowmem.disk import writing
from lowmem.errors import LowmemError
from lowmem.machine import choose_device, describe, this_machine
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.planning.devices import device_spec, settle_amp
from lowmem.planning.plan import LoaderPlan
from lowmem.planning.planner import default_ram
from lowmem.profiling.candidates import Question, loader_name, loader_plans, plan_cases
from lowmem.profiling.measure import Limits, Stations, Told, measure_joint, measure_loader, measure_plans, tree_bytes
from lowmem.profiling.page import write_figures, write_profile_report
from lowmem.profiling.result import FILE, JointCase, PlanCase, ProfileFile
from lowmem.profiling.schedule import Cost, one_more_fits
from lowmem.profiling.sweet_spot import best_loader, best_plan, chosen_plan, not_measured, sentences
from lowmem.progress import open_progress
from lowmem.recipe import load_recipe
from lowmem.sizes import format_size, parse_size
from lowmem.training.start import open_data

PLANNING_SHARE, PLANS_SHARE = 0.2, 0.45
"""Share of the time left that planning may take, and of the whole after which no plan is measured; the first has more (schedule.py)."""
LOADERS_SHARE = 0.3
"""Share of the time left after the plans in which workers run by themselves."""
PROCESS_S = 5.0
"""What a process takes to start and to import torch, until it was measured."""
EXIT_DONE, EXIT_STOPPED = 0, 130


@dataclass(frozen=True)
class ProfileRequest:
    """The options of `lowmem profile`."""

    recipe: str = "quickstart"
    data: Path | None = None
    vram: str = "8G"
    ram: str | None = None
    device: str = "auto"
    minutes: float = 5.0
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)
    """From when on the minutes count, as `time.monotonic` tells it."""


class Profiling:
    """One profile in the making: what is known so far is in `profile`, and on the disk after each stage."""

    def __init__(self, request: ProfileRequest, console: Console) -> None:
        self.request, self.console = request, console
        self.started, self.step_cost = request.started, Cost()
        vram, ram = parse_size(request.vram), parse_size(request.ram) if request.ram else default_ram()
        recipe = load_recipe(request.recipe, request.overrides)
        self.device = choose_device(request.device)
        self.spec = device_spec(self.device)
        self.recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, self.spec)})
        self.folder = _new_folder(request)
        with open_progress(console) as progress:
            self.dataset: Dataset = open_data(self.recipe, request.data, progress)
        self.profile = ProfileFile(
            command=" ".join(["lowmem", *sys.argv[1:]]),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            minutes=request.minutes,
            machine=this_machine(),
            recipe_name=request.recipe,
            recipe=self.recipe,
            data_root=str(request.data or "the embedded images"),
            fingerprint=self.dataset.fingerprint,
            num_classes=len(self.dataset.classes),
            num_train=len(self.dataset.train),
            vram_bytes=vram,
            ram_bytes=ram,
        )

    def run(self) -> None:
        """All three measurements; KeyboardInterrupt leaves what was measured."""
        self.measure_plans()
        self.measure_loaders()
        self.measure_joint()
        self.change(finished=True)

    def measure_plans(self) -> None:
        profile = self.profile
        counts = (profile.vram_bytes, profile.ram_bytes, profile.num_classes, profile.num_train)
        self._say("planning what to compare")
        until = time.monotonic() + PLANNING_SHARE * self._left_s()
        cases, missing = plan_cases(Question(self.recipe, self.spec, str(self.device), *counts), until)
        self.change(plans=tuple(cases), plans_not_made=tuple(missing))
        with self._stations(with_images=False) as stations:
            with self._progress("plans") as told:
                measure_plans(cases, stations, Limits(self._at(PLANS_SHARE), self._at(1.0)), told)
            self.step_cost = stations.cost(cases[0].plan) or Cost()
            self.change(process_bytes=tree_bytes()[0] if self.device.type == "cuda" else self._process_bytes())

    def measure_loaders(self) -> None:
        """Ways of loading by themselves, as many as there is time for beside the step afterwards."""
        plans = loader_plans(self.profile.plans[0].plan.loader)
        self.change(ways=tuple(plans))
        seconds = min(8.0, max(1.0, LOADERS_SHARE * self._left_s() / len(plans)))
        alone_s = PROCESS_S + seconds
        for number, loader in enumerate(plans):
            if not one_more_fits(number, alone_s, self._beside(loader), self._left_s()):
                break
            self._say(f"loading alone, {number + 1} of {len(plans)}: {loader_name(loader)}; {self._clock()}")
            started = time.monotonic()
            case = measure_loader(self.dataset.train, self.recipe, loader, seconds, self._at(1.0))
            alone_s = time.monotonic() - started
            self.change(loaders=(*self.profile.loaders, case))

    def measure_joint(self) -> None:
        best = best_plan(self.profile.plans)
        cases = [JointCase(loader=case.loader, extra_bytes=case.extra_bytes) for case in self.profile.loaders]
        if best is None or not cases:
            return
        limits = Limits(self._at(1.0), self._at(1.0), self._beside(cases[0].loader))
        with self._stations(with_images=True) as stations, self._progress("joint") as told:
            measure_joint(cases, best.plan, stations, limits, told)

    def _beside(self, loader: LoaderPlan) -> Cost:
        """What this way of loading costs beside the step: its batches are run in before each round."""
        best = best_plan(self.profile.plans)
        step_s = best.step.median if best else 0.0
        return Cost(self.step_cost.open_s, self.step_cost.round_s + (loader.prefetch_batches + 1) * step_s)

    def finish(self) -> ProfileFile:
        """Choose, and write everything."""
        best = best_plan(self.profile.plans)
        if best is not None:
            held = best.plan.prediction.host_bytes if best.plan.prediction else 0
            free = self.profile.ram_bytes - self.profile.process_bytes - held
            joint = best_loader(self.profile.joint, self.device.type == "cuda", free)
            plan = chosen_plan(best, joint, self.profile.num_train, self.recipe.batch.size)
            told = sentences(best, self.profile.plans, joint, self.profile.joint)
            told += _budget_warning(joint, self.profile, free) + _doubt(self.profile) + _left_out(self.profile)
            self.change(chosen=plan, sentences=tuple(told))
            with writing(self.folder, "the plan"):
                plan.save(self.folder / "plan.json")
        self.change(seconds=round(time.monotonic() - self.started, 1))
        with writing(self.folder, "the figures"):
            write_figures(self.profile, self.folder / "figures")
            write_profile_report(self.folder)
        return self.profile

    def change(self, **changes: Any) -> None:
        self.profile = self.profile.model_copy(update=changes)
        with writing(self.folder, "the profile"):
            self.profile.save(self.folder / FILE)

    @contextmanager
    def _stations(self, with_images: bool) -> Iterator[Stations]:
        split = self.dataset.train if with_images else None
        work = Work(self.recipe, self.profile.num_classes, split)
        with closing(Stations(work, self.device.type == "cuda", self._at(1.0))) as stations:
            yield stations

    @contextmanager
    def _progress(self, field: str) -> Iterator[Told]:
        """Context: what is called with the cases before and after every visit keeps them and tells of them."""
        every_s, shown = 2.0 if self.console.is_terminal else 10.0, 0.0

        def told(now: list[Any], turn: int) -> None:
            nonlocal shown
            self.profile = self.profile.model_copy(update={field: tuple(now)})
            case = now[turn]
            begins = not case.rounds_s and not case.failure
            if begins or time.monotonic() - shown > every_s:
                shown = time.monotonic()
                self._say(f"{_STAGES[field]}, {turn + 1} of {len(now)}: {_case_name(case)}; {self._clock()}")

        try:
            yield told
        finally:
            self.change(**{field: getattr(self.profile, field)})

    def _process_bytes(self) -> int:
        """This process less what its open stations hold beside the first one."""
        peaks = [case.peak_bytes for case in self.profile.plans if case.rounds_s]
        return max(0, tree_bytes()[0] - sum(peaks) + max(peaks, default=0))

    def _at(self, share: float) -> float:
        """When this share of the time is over, as `time.monotonic` tells it."""
        return self.started + share * 60 * self.request.minutes

    def _left_s(self) -> float:
        return self._at(1.0) - time.monotonic()

    def _clock(self) -> str:
        return f"{time.monotonic() - self.started:.0f} of {60 * self.request.minutes:.0f} s"

    def _say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)


_STAGES = {"plans": "plan", "joint": "plan and loading together"}


def _case_name(case: PlanCase | JointCase) -> str:
    name = case.name if isinstance(case, PlanCase) else loader_name(case.loader)
    return f"{name}, round {len(case.rounds_s)}" if case.rounds_s else name


def run_profile(request: ProfileRequest, console: Console) -> int:
    """Measure and choose; returns the exit code. Raises LowmemError before the first measurement where anything is wrong."""
    prepare_allocator()
    if not request.minutes > 0:
        raise LowmemError(f"--minutes {request.minutes:g}: give minutes above 0, as in --minutes 5.")
    profiling = Profiling(request, console)
    say = profiling._say
    say(
        f"Profile of {profiling.recipe.model.name} on {describe(profiling.profile.machine)}, about {request.minutes:g} minutes"
    )
    threads, stopped = torch.get_num_threads(), False
    try:
        profiling.run()
    except KeyboardInterrupt:
        stopped = True
    finally:
        torch.set_num_threads(threads)
    profile = profiling.finish()
    for sentence in profile.sentences:
        say(sentence)
    if profile.chosen is None and not stopped:
        raise LowmemError(_nothing_measured(profile, profiling.folder))
    if profile.chosen is None:
        say(f"Stopped before anything was measured. What there is: {profiling.folder}")
        return EXIT_STOPPED
    say(f"Train with it: lowmem train --recipe {request.recipe} --profile {profiling.folder}{_data_option(request)}")
    say(f"Report: {profiling.folder / 'report.html'}")
    if stopped:
        say("Stopped early: this is what had been measured until then.")
    return EXIT_STOPPED if stopped else EXIT_DONE


def _nothing_measured(profile: ProfileFile, folder: Path) -> str:
    failures = [case.failure for case in profile.plans if case.failure]
    if failures:
        return f"No plan could be measured: {failures[0]}"
    return (
        f"--minutes {profile.minutes:g}: over before one plan was warm. Give more, as in --minutes {max(1.0, 4 * profile.minutes):g}. "
        f"What there is: {folder}"
    )


def _budget_warning(joint: JointCase | None, profile: ProfileFile, free_bytes: int) -> list[str]:
    if joint is not None or not profile.joint:
        return []
    return [
        f"--ram {format_size(profile.ram_bytes)} leaves {format_size(max(0, free_bytes))} for loading, less than any way of loading takes; "
        "the plan keeps its own loader. Give a larger --ram."
    ]


def _doubt(profile: ProfileFile) -> list[str]:
    cases = [case for case in (*profile.plans, *profile.joint) if not case.failure]
    unstable = [case for case in cases if not case.is_stable]
    if not unstable:
        return []
    fewest = min(len(case.rounds_s) for case in cases)
    return [
        f"{len(unstable)} of {len(cases)} figures were not stable yet (the fewest rounds: {fewest}); more --minutes, or a quieter machine, would settle them."
    ]


def _left_out(profile: ProfileFile) -> list[str]:
    missing = not_measured(profile)
    return [f"Not measured for lack of time (more --minutes bring them): {'; '.join(missing)}."] if missing else []


def _data_option(request: ProfileRequest) -> str:
    return f" --data {request.data}" if request.data else ""


def _new_folder(request: ProfileRequest) -> Path:
    stem = Path(request.recipe).stem
    folder = request.out or Path("profiles") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LowmemError(f"--out {folder}: exists and is not empty. Name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LowmemError(f"--out {folder}: cannot be made: {error.strerror}. Name another folder.") from None
    return folder
