"""A plan in words."""

from itertools import groupby

from lowmem.planning.plan import KEEP_ALL, BlockPolicy, Plan
from lowmem.sizes import format_size


def plan_lines(plan: Plan) -> list[str]:
    """What a user reads before training: the budget, the predicted memory and time, and what is done about them."""
    lines = [
        f"Plan for {plan.device_name}: {plan.amp_dtype}, {plan.micro_batch} images per pass, {plan.memory_format}, exactness {plan.exactness}"
    ]
    if plan.budget is not None and plan.budget.deductions:
        lines.append(f"  budget {format_size(plan.budget.total_bytes)}")
        lines += [f"    less {format_size(line.num_bytes)}: {line.what}" for line in plan.budget.deductions]
        lines.append(f"    leaves {format_size(plan.budget.tensor_bytes)} for tensors")
    elif plan.budget is not None:
        lines.append(f"  budget {format_size(plan.budget.total_bytes)} of tensors")
    if plan.prediction is not None:
        parts = [f"{name} {format_size(value)}" for name, value in plan.prediction.peak.model_dump().items() if value]
        lines.append(f"  predicted peak {format_size(plan.prediction.peak.total)}: {', '.join(parts)}")
        lines += _time_lines(plan)
    lines += [f"  {reason}" for reason in plan.reasons]
    if plan.host is not None:
        lines.append(f"  host memory {format_size(plan.host.num_bytes)} of {format_size(plan.host.total_bytes)}:")
        lines += [f"    {format_size(line.num_bytes)}: {line.what}" for line in plan.host.lines]
    workers = plan.loader.in_words
    threads = f", {plan.loader.torch_threads} threads for torch" if plan.loader.torch_threads else ""
    lines.append(f"  {workers}{threads}, evaluation in batches of up to {plan.eval_batch}")
    return lines


def reasons_for(plan: Plan, unconstrained_bytes: int) -> list[str]:
    """Sentences that say what the plan does to fit, and why."""
    assert plan.budget is not None
    room = plan.budget.tensor_bytes
    if not plan.blocks and plan.optimizer == "device" and plan.exactness == "bitwise":
        return [
            f"Everything fits: the step needs {format_size(unconstrained_bytes)} of {format_size(room)}, so nothing is recomputed or moved."
        ]
    reasons = [
        f"With nothing recomputed or moved the step would need {format_size(unconstrained_bytes)}; {format_size(room)} are there."
    ]
    reasons += [f"{paths[0].upper()}{paths[1:]}: {words}." if paths.startswith("the stem") else f"{paths}: {words}." for words, paths in _runs(plan)]
    if plan.optimizer == "backward":
        reasons.append(
            "Each weight is updated as soon as its gradient is complete, so the gradients are never all there at once."
        )
    if plan.optimizer == "host":
        reasons.append("AdamW's state lives in host memory and visits the device for each update.")
    if plan.exactness == "rounding":
        reasons.append(
            "The batch is split over passes; the network has no live batch norm, so only the rounding of sums changes."
        )
    if plan.exactness == "statistical":
        reasons.append("The norm batch is split, which gives another classifier; you allowed it.")
    return reasons


def _time_lines(plan: Plan) -> list[str]:
    prediction = plan.prediction
    assert prediction is not None
    if prediction.step_s is None or prediction.epoch_s is None or not prediction.baseline_step_s:
        return []
    overhead = prediction.step_s / prediction.baseline_step_s - 1
    source = {
        "roofline": "a roofline from the data sheet",
        "measured": "block times measured here",
        "profile": "steps measured here by lowmem profile",
        "none": "",
    }[prediction.time_source]
    cost = f", {overhead:+.1%} over the unconstrained step" if abs(overhead) > 5e-4 else ""
    return [
        f"  predicted time {prediction.step_s:.3g} s a step, {_duration(prediction.epoch_s)} an epoch{cost} (from {source})"
    ]


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _runs(plan: Plan) -> list[tuple[str, str]]:
    """What is done to blocks, as (words, "layer3.0 to layer3.5 (6 blocks), layer4.1"), in the order of the blocks."""
    places: dict[str, list[str]] = {}
    for words, members in groupby(plan.blocks.items(), key=lambda item: _policy_in_words(item[1])):
        paths = [path or "the stem (what comes before the first block)" for path, _ in members]
        name = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]} ({len(paths)} blocks)"
        places.setdefault(words, []).append(name)
    places.pop(_policy_in_words(KEEP_ALL), None)
    return [(words, ", ".join(names)) for words, names in places.items()]


def _policy_in_words(policy: BlockPolicy) -> str:
    if policy.recompute == "full":
        return "keeps only its input and is run again in the backward pass"
    if policy.recompute == "none":
        where = "" if not policy.offloads else " in host memory" if policy.host == "all" else ", a part in host memory"
        if policy.again:
            return f"some tensors are made again in the backward pass, each when it is needed; the rest is kept{where}"
        return f"keeps everything{where}"
    where = (
        ""
        if not policy.offloads
        else ", in host memory,"
        if policy.host in ("all", policy.keep)
        else ", some in host memory,"
    )
    return f"keeps the outputs {', '.join(map(str, policy.keep))} of its convolutions and products{where} and recomputes the rest"
