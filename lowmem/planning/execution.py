"""How kernels are run, where more than one way gives the same classifier up to rounding: tried on the device, taken where it is faster."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.errors import LowmemError
from lowmem.planning.plan import Compiled, Plan
from lowmem.sizes import format_size

WISHES = ("none", "measured")
MIN_GAIN_FRAC = 0.02
"""A gain below this share of a step is within the noise of the measurement."""
IN_WORDS: dict[Compiled, str] = {
    "none": "as they are",
    "blocks": "compiled",
    "graphs": "compiled and replayed as CUDA graphs",
}


@dataclass(frozen=True)
class Trial:
    """Some real steps of a plan on its device; `failure` says why there were none, in a line."""

    compiled: Compiled
    step_s: float = float("inf")
    peak_bytes: int = 0
    failure: str = ""


def refuse_compile(wish: str, allow: str, device_type: str) -> None:
    """Raises LowmemError where the option --compile is none, or contradicts --allow or the device."""
    if wish not in WISHES:
        raise LowmemError(f"--compile {wish}: give none or measured.")
    if wish == "measured" and allow == "bitwise":
        raise LowmemError(
            "--compile measured fuses kernels, which round differently; --allow bitwise rules that out. Use --allow rounding, or leave one out."
        )
    if wish == "measured" and device_type != "cuda":
        raise LowmemError(
            "--compile measured needs a CUDA card: on a CPU a budget counts tensors, and compiled code hides them. Leave it out."
        )


def fastest(plan: Plan, trials: Sequence[Trial]) -> Plan:
    """The plan, run in the fastest way that was tried and fits; every trial is told of in its reasons."""
    own = next(trial for trial in trials if trial.compiled == "none")
    best = min(trials, key=lambda trial: trial.step_s)
    if best.step_s > (1 - MIN_GAIN_FRAC) * own.step_s:
        best = own
    told = "; ".join(_in_words(trial, own) for trial in trials if trial is not own)
    reason = f"Blocks that keep everything run {IN_WORDS[best.compiled]}. " + (
        f"Tried here: {told}." if told else "Compiled code would not give this network's random masks or statistics."
    )
    changes: dict[str, object] = {"compiled": best.compiled, "reasons": (*plan.reasons, reason)}
    if best.compiled != "none":
        changes["exactness"] = "rounding" if plan.exactness == "bitwise" else plan.exactness
    return plan.model_copy(update=changes)


def keep_kernels(plan: Plan, earlier: Plan) -> Plan:
    """A plan that takes over from another in the middle of a run: the same kernels, so the same layouts and, on a card, compilation."""
    compiled = earlier.compiled if plan.device.startswith("cuda") else "none"
    if not earlier.layouts and compiled == "none":
        return plan
    exactness = "rounding" if plan.exactness == "bitwise" else plan.exactness
    return plan.model_copy(update={"layouts": earlier.layouts, "compiled": compiled, "exactness": exactness})


def _in_words(trial: Trial, own: Trial) -> str:
    if trial.failure:
        return f"{IN_WORDS[trial.compiled]}: {trial.failure}"
    return f"{IN_WORDS[trial.compiled]} {trial.step_s / own.step_s - 1:+.1%} time, peak {format_size(trial.peak_bytes)}"
