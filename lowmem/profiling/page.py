"""The figures and the page of a profile."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from lowmem.benchmarking.statistics import Spread
from lowmem.planning.explain import plan_lines
from lowmem.profiling.candidates import loader_name
from lowmem.profiling.result import FILE, LoaderCase, ProfileFile, load_profile
from lowmem.profiling.sweet_spot import NEVER_WAITS_FRAC, best_plan
from lowmem.results.charts import BLUE, GREY, VERMILION, panel, png_bytes, svg_text
from lowmem.results.measured import measured_section
from lowmem.results.page import Cards, Drawing, Figures, Lines, Page, Section, Table, write_page
from lowmem.sizes import MIB, format_size

NOTE = "Medians of rounds of about a second each, taken in turn; the bars show the middle half."


def is_profile_folder(path: Path) -> bool:
    file = path / FILE
    if not file.is_file() or (path / "recipe.toml").is_file():  # a run folder has a profile of its own
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("kind") == "lowmem profile"
    except (ValueError, AttributeError):
        return False


def write_profile_report(folder: Path) -> Path:
    return write_page(profile_page(load_profile(folder)), folder / "report.html")


def write_figures(profile: ProfileFile, folder: Path) -> None:
    """Every figure as SVG and PNG."""
    folder.mkdir(exist_ok=True)
    for name, (figure, _) in figures(profile).items():
        (folder / f"{name}.svg").write_text(svg_text(figure), encoding="utf-8")
        (folder / f"{name}.png").write_bytes(png_bytes(figure))


def figures(profile: ProfileFile) -> dict[str, tuple[Figure, str]]:
    found = {}
    if any(case.rounds_s for case in profile.plans):
        found["plans"] = _plans(profile), f"Each point is a plan. {NOTE} Orange: the sweet spot."
    if profile.loaders:
        found["loaders"] = _loaders(profile), "Workers by themselves, each in a process of its own."
    if any(case.rounds_s for case in profile.joint):
        found["joint"] = _joint(profile), f"The chosen plan fed by each way of loading. {NOTE}"
    return found


def profile_page(profile: ProfileFile) -> Page:
    drawings = [Drawing.of(figure, caption) for figure, caption in figures(profile).values()]
    return Page(
        title=f"Profile of {profile.recipe.model.name}",
        lead=profile.sentences[0] if profile.sentences else "Nothing was measured yet.",
        sections=(
            Section("Sweet spot", *([_cards(profile), Lines(profile.sentences)] if profile.sentences else [])),
            Section("Figures", *([Figures(*drawings)] if drawings else [])),
            Section("Plans", *([_plan_table(profile)] if profile.plans else [])),
            Section("Loading beside the step", *([_joint_table(profile)] if profile.joint else [])),
            Section("Loading alone", *([_loader_table(profile)] if profile.loaders else [])),
            Section("The plan in words", *([Lines(plan_lines(profile.chosen))] if profile.chosen else [])),
            measured_section(profile.machine.model_dump(mode="json"), _counts(profile)),
        ),
    )


def _cards(profile: ProfileFile) -> Cards:
    chosen, case = profile.chosen, best_plan(profile.plans)
    assert chosen is not None and case is not None and chosen.prediction is not None and chosen.prediction.step_s
    facts = [
        ("a step", f"{1000 * chosen.prediction.step_s:.4g} ms"),
        ("images/s", f"{profile.recipe.batch.size / chosen.prediction.step_s:.1f}"),
        ("peak on the device", format_size(case.peak_bytes)),
    ]
    if profile.joint:
        facts.append(("loading", loader_name(chosen.loader)))
    return Cards(facts)


def _plans(profile: ProfileFile) -> Figure:
    figure, ax = panel("Time against memory")
    best = best_plan(profile.plans)
    for case in profile.plans:
        if case.rounds_s:
            colour = VERMILION if case is best else BLUE
            _point(ax, case.peak_bytes / MIB, case.step, colour)
    ax.set_xlabel("measured peak, MiB")
    ax.set_ylabel("ms a step")
    ax.set_ylim(bottom=0)
    return figure


def _loaders(profile: ProfileFile) -> Figure:
    figure, ax = panel("Loading alone")
    marks = {"inline": "s", "threads": "o", "processes": "^"}
    for kind, mark in marks.items():
        cases = [case for case in profile.loaders if case.loader.kind == kind]
        rates = [_median(case) for case in cases]
        ax.plot(
            [case.extra_bytes / MIB for case in cases],
            rates,
            mark,
            label=kind,
            color=BLUE if kind == "threads" else GREY,
        )
        for case, rate in zip(cases, rates):
            ax.annotate(
                f"{case.loader.workers}", (case.extra_bytes / MIB, rate), xytext=(5, 4), textcoords="offset points"
            )
    ax.set_xlabel("host memory that it adds, MiB")
    ax.set_ylabel("images/s")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.12)
    ax.legend(loc="lower right")
    return figure


def _joint(profile: ProfileFile) -> Figure:
    figure, ax = panel("A step with its images")
    cases = [case for case in profile.joint if case.rounds_s]
    chosen = profile.chosen.loader if profile.chosen else None
    for place, case in enumerate(cases):
        total_ms = 1000 * case.step.median
        waiting_ms = total_ms * case.wait_frac
        ax.barh(place, total_ms - waiting_ms, color=VERMILION if case.loader == chosen else BLUE)
        ax.barh(place, waiting_ms, left=total_ms - waiting_ms, color=GREY, label="" if place else "waiting for images")
        ax.plot([1000 * case.step.low, 1000 * case.step.high], [place, place], color="#1b1f24", linewidth=1)
    ax.set_yticks(range(len(cases)), [loader_name(case.loader) for case in cases])
    ax.set_xlabel("ms a step")
    ax.legend(loc="lower left", fontsize=8)
    return figure


def _point(ax: object, x: float, step: Spread, colour: str) -> None:
    error = [[1000 * (step.median - step.low)], [1000 * (step.high - step.median)]]
    ax.errorbar([x], [1000 * step.median], yerr=error, fmt="o", color=colour, capsize=3)  # type: ignore[attr-defined]


def _plan_table(profile: ProfileFile) -> Table:
    best = best_plan(profile.plans)
    rows = [
        (
            case.name,
            case.failure or _spread(case.step),
            format_size(case.peak_bytes),
            str(len(case.rounds_s)),
            _stable(case.is_stable),
        )
        if case.rounds_s or case.failure
        else (case.name, "not measured for lack of time", "", "0", "")
        for case in profile.plans
    ]
    bold = [number for number, case in enumerate(profile.plans) if case is best]
    return Table(("plan (predicted peak)", "ms a step", "peak", "n", "stable"), rows, bold=bold, left=(0,))


def _joint_table(profile: ProfileFile) -> Table:
    rows = [
        (
            loader_name(case.loader),
            _spread(case.step),
            f"{100 * case.wait_frac:.1f} %",
            format_size(case.extra_bytes),
            str(len(case.rounds_s)),
            _stable(case.is_stable),
        )
        for case in profile.joint
        if case.rounds_s
    ]
    chosen = profile.chosen.loader if profile.chosen else None
    bold = [number for number, case in enumerate(c for c in profile.joint if c.rounds_s) if case.loader == chosen]
    return Table(("loading", "ms a step", "waiting", "host memory", "n", "stable"), rows, bold=bold)


def _loader_table(profile: ProfileFile) -> Table:
    rows = [
        (loader_name(case.loader), f"{_median(case):.0f}", format_size(case.extra_bytes), str(len(case.images_per_s)))
        for case in profile.loaders
    ]
    kind = profile.loaders[0].memory_kind.upper()
    return Table(("loading", "images/s", f"adds ({kind})", "n"), rows)


def _median(case: LoaderCase) -> float:
    values = sorted(case.images_per_s)
    return values[len(values) // 2] if values else 0.0


def _spread(found: Spread) -> str:
    return f"{1000 * found.median:.1f} ({1000 * found.low:.1f} to {1000 * found.high:.1f})"


def _stable(yes: bool) -> str:
    return "yes" if yes else "no"


def _counts(profile: ProfileFile) -> list[str]:
    return [
        profile.command,
        f"{profile.seconds:.0f} of {60 * profile.minutes:.0f} s used, {profile.started}{'' if profile.finished else '; stopped before every figure was stable'}",
        f"{profile.num_train} training images in {profile.data_root}; batch {profile.recipe.batch.size} at {profile.recipe.data.train_px} px",
        f"budgets {format_size(profile.vram_bytes)} on the device, {format_size(profile.ram_bytes)} in the host, of which the process itself takes "
        f"{format_size(profile.process_bytes)}",
        "Rounds of about a second, in turn; a case is begun only with time for three of them; a figure is stable when the 95 % interval of its median is within 2 % of it after five rounds "
        f"or more. A device that waits less than {100 * NEVER_WAITS_FRAC:.0f} % of the time is said never to wait.",
    ]
