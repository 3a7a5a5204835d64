"""From measurements to a choice, and the choice in words. Nothing here measures."""

from collections.abc import Sequence

from lowmem.planning.plan import Plan, Prediction
from lowmem.profiling.candidates import loader_name
from lowmem.profiling.result import JointCase, PlanCase, ProfileFile
from lowmem.sizes import format_size

TIE_FRAC = 0.02
"""Times that differ by less are taken as equal; so are those whose intervals overlap."""
NEVER_WAITS_FRAC = 0.01


def best_plan(cases: Sequence[PlanCase]) -> PlanCase | None:
    """The least memory among the plans that are as quick as the quickest."""
    measured = [case for case in cases if case.rounds_s and not case.failure]
    if not measured:
        return None
    quickest = min(measured, key=lambda case: case.step.median)
    return min((case for case in measured if _as_quick(case, quickest)), key=lambda case: case.peak_bytes)


def best_loader(cases: Sequence[JointCase], on_card: bool, free_bytes: int) -> JointCase | None:
    """The least memory among those with which a step takes no longer than with the best.

    On a card those with which it never waits go first. On a CPU the loader has the same cores as the step, so that the time of both
    together counts, not the wait.
    """
    measured = [case for case in cases if case.rounds_s and not case.failure and case.extra_bytes <= free_bytes]
    patient = [case for case in measured if case.wait_frac <= NEVER_WAITS_FRAC]
    pool = patient if on_card and patient else measured
    if not pool:
        return None
    quickest = min(pool, key=lambda case: case.step.median)
    return min(
        (case for case in pool if _as_quick(case, quickest)), key=lambda case: (case.extra_bytes, case.step.median)
    )


def neighbours(case: PlanCase, cases: Sequence[PlanCase]) -> tuple[PlanCase | None, PlanCase | None]:
    """(the next with less memory, the next with more)."""
    ordered = sorted((each for each in cases if each.rounds_s and not each.failure), key=lambda each: each.peak_bytes)
    place = ordered.index(case)
    return (ordered[place - 1] if place else None), (ordered[place + 1] if place + 1 < len(ordered) else None)


def loader_neighbours(case: JointCase, cases: Sequence[JointCase]) -> tuple[JointCase | None, JointCase | None]:
    """(with fewer workers, with more) of the same kind; in line counts as none."""
    of_kind = {0: [c for c in cases if not c.loader.workers]}
    kind = case.loader.kind if case.loader.workers else "threads"
    for each in cases:
        same = each.loader.kind == kind and each.loader.prefetch_batches == case.loader.prefetch_batches
        if each.loader.workers and same and each.rounds_s:
            of_kind[each.loader.workers] = [each]
    counts = sorted(count for count, found in of_kind.items() if found and found[0].rounds_s)
    fewer = [n for n in counts if n < case.loader.workers]
    more = [n for n in counts if n > case.loader.workers]
    return (of_kind[fewer[-1]][0] if fewer else None), (of_kind[more[0]][0] if more else None)


def chosen_plan(case: PlanCase, joint: JointCase | None, num_train: int, batch_size: int) -> Plan:
    """The plan to train with: measured times in place of predicted ones, and the loader."""
    step_s = joint.step.median if joint else case.step.median
    prediction = case.plan.prediction or Prediction(peak={})
    prediction = prediction.model_copy(
        update={"step_s": step_s, "baseline_step_s": step_s, "epoch_s": step_s * max(1, num_train // batch_size), "time_source": "profile"}
    )
    changes: dict[str, object] = {"prediction": prediction}
    if joint is not None:
        changes["loader"] = joint.loader
    return case.plan.model_copy(update=changes)


def sentences(
    case: PlanCase, plans: Sequence[PlanCase], joint: JointCase | None, joints: Sequence[JointCase]
) -> list[str]:
    """The sweet spot, and what lies on either side of it."""
    lower, higher = neighbours(case, plans)
    told = [f"Plan: {case.name}; {_ms(case.step.median)} a step, peak {format_size(case.peak_bytes)}."]
    told.append(
        f"One lower ({lower.name}) would save {format_size(case.peak_bytes - lower.peak_bytes)} and cost {_percent(lower, case)} time."
        if lower
        else "No leaner plan was measured."
    )
    told.append(
        f"One higher ({higher.name}) would take {format_size(higher.peak_bytes - case.peak_bytes)} more and bring {_percent(higher, case)} time."
        if higher
        else "None within the budget that uses more memory was measured."
    )
    return told if joint is None else told + _loader_sentences(joint, joints)


def not_measured(profile: ProfileFile) -> list[str]:
    """What there was no time for, in words."""
    plans = [f"plan {case.name}" for case in profile.plans if not case.rounds_s and not case.failure]
    measured = {case.loader for case in profile.joint if case.rounds_s or case.failure}
    loading = [f"loading {loader_name(way)}" for way in profile.ways if way not in measured]
    return [*plans, *profile.plans_not_made, *loading]


def _loader_sentences(joint: JointCase, joints: Sequence[JointCase]) -> list[str]:
    told = [
        f"Loading: {loader_name(joint.loader)}, {format_size(joint.extra_bytes)} of host memory; a step takes "
        f"{_ms(joint.step.median)}, {100 * joint.wait_frac:.1f} % of it waiting for images."
    ]
    fewer, more = loader_neighbours(joint, joints)
    for side, other in (("One lower", fewer), ("One higher", more)):
        if other is not None:
            change = other.extra_bytes - joint.extra_bytes
            told.append(
                f"{side} ({loader_name(other.loader)}): {_percent(other, joint)} time, {100 * other.wait_frac:.1f} % waiting, "
                f"{format_size(abs(change))} {'more' if change > 0 else 'less'} host memory."
            )
    return told


def _as_quick(case: PlanCase | JointCase, quickest: PlanCase | JointCase) -> bool:
    ratio = case.step.median / quickest.step.median - 1
    doubt = sum(each.step.uncertainty_frac for each in (case, quickest) if each.step.n > 1)
    return ratio <= max(TIE_FRAC, min(doubt, 2 * TIE_FRAC))


def _percent(case: PlanCase | JointCase, base: PlanCase | JointCase) -> str:
    return f"{100 * (case.step.median / base.step.median - 1):+.1f} %"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
