"""An earlier run continued: from its newest good checkpoint, on the same images, under the same recipe or one that was changed on
purpose, under the same plan or another."""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.data.folder import Dataset
from lowmem.errors import LowmemError
from lowmem.machine import choose_device
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.planning.devices import device_spec, settle_amp
from lowmem.planning.execution import keep_kernels
from lowmem.planning.explain import plan_lines
from lowmem.planning.plan import Plan
from lowmem.progress import Progress, open_progress
from lowmem.recipe import Recipe, field_names, with_overrides
from lowmem.results.classifier import put_back_classifier
from lowmem.sizes import short_size
from lowmem.training.checkpoint import Checkpoint, Checkpoints
from lowmem.training.folder import RunFolder, open_run_folder
from lowmem.training.keeping import save_checkpoint
from lowmem.training.lock import RunLock
from lowmem.training.model import build_model, initialised_model
from lowmem.training.run import Run
from lowmem.training.start import (
    TrainRequest,
    assemble,
    cache_for,
    first_run_state,
    open_data,
    parse_cadence,
    plan_for,
    run_to_end,
)
from lowmem.training.state import RunState

FIXED_KEYS = (
    "model.name",
    "model.options",
    "model.weights",
    "model.weights_optional",
    "model.head_init",
    "data.val_fraction",
    "seed",
)
"""What a run cannot change in the middle: its weights, its split of the images and its random draws hang on these."""
PLAN_IS_KEPT = (
    "schedule.",
    "augment.",
    "loss.",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.layer_decay",
    "optimizer.exclude_norm_and_bias",
    "ema.",
)
"""Changes that cost neither memory nor time; after any other a new plan is made for the same budget."""


@dataclass(frozen=True)
class ResumeRequest:
    """The options of `lowmem resume`; None leaves as it was."""

    run: Path
    vram: str | None = None
    ram: str | None = None
    device: str | None = None
    allow: str | None = None
    data: Path | None = None
    overrides: tuple[str, ...] = ()
    checkpoint_every: str = "10m"
    cache: Path | None = None
    cache_bytes: str | None = None


def resume_run(request: ResumeRequest) -> int:
    """Continue an earlier run; returns the exit code. Without changes it ends in bitwise the classifier of a run in one go."""
    prepare_allocator()
    cadence = parse_cadence(request.checkpoint_every)
    folder = open_run_folder(request.run)
    with ExitStack() as stack:
        progress = stack.enter_context(open_progress())
        lock = stack.enter_context(RunLock(folder))
        _tell_of_last_end(lock, folder, progress)
        put_back_classifier(folder.classifier)
        checkpoints = Checkpoints(folder.checkpoints)
        where, checkpoint = _newest(checkpoints, progress)
        before = checkpoint.state.recipe if checkpoint else folder.read_recipe()
        recipe = changed_recipe(before, request.overrides, checkpoint.state.step if checkpoint else 0)
        cache = cache_for(recipe, request.cache, request.cache_bytes, folder.cache())
        dataset = open_data(recipe, request.data or folder.data_root(), progress, cache)
        folder.check_same_data(dataset, checkpoint.state.dataset if checkpoint else folder.data_fingerprint())
        old_plan = folder.read_plan()
        device = choose_device(request.device or old_plan.device)
        recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, device_spec(device))})
        changes = recipe_changes(before, recipe)
        plan = _plan(request, old_plan, device, recipe, changes, dataset)
        if checkpoint:
            _tell_of_edits(folder, before, where, progress)
            model = build_model(recipe.model, len(dataset.classes))
            state = _changed_state(checkpoint.state, before, recipe)
        else:
            model, _ = initialised_model(recipe.model, len(dataset.classes), recipe.seed)
            state = first_run_state(recipe, dataset)
        run = assemble(stack, folder, checkpoints, recipe, plan, dataset, model, state, progress, cadence)
        if checkpoint:
            run.restore(dataclasses.replace(checkpoint, state=state))
        folder.record("resumed", checkpoint=where, vram=request.vram, epoch=state.epoch, step=state.step)
        _tell_where_it_stands(run, where, old_plan)
        if changes or not checkpoint:
            save_checkpoint(run, wait=True)
        if changes:
            _record_changes(folder, recipe, state, changes)
        folder.write_plan(plan)
        return run_to_end(run)


def changed_recipe(recipe: Recipe, overrides: tuple[str, ...], step: int) -> Recipe:
    """The recipe with overrides; raises LowmemError where a run cannot change that in the middle."""
    changed = with_overrides(recipe, overrides)
    keys = [key for key, _, _ in _differences(recipe, changed)]
    for key in keys:
        if key in FIXED_KEYS:
            raise LowmemError(
                f"--set {key}: a run cannot change {key} in the middle. Start a new one with lowmem train --set {key}=..."
            )
        if key == "ema.decay" and None in (recipe.ema.decay, changed.ema.decay):
            raise LowmemError(
                "--set ema.decay: a run cannot begin or end its average in the middle. Start a new one with lowmem train --set ema.decay=..."
            )
        if key == "batch.size" and step:
            raise LowmemError(
                f"--set batch.size: the run stands at step {step} of an epoch, whose steps are counted in batches. Change it at an "
                f"epoch's end, or start a new run."
            )
    return changed


def recipe_changes(before: Recipe, after: Recipe) -> list[str]:
    """What differs, in words: `optimizer.lr: 0.001 -> 0.0001`."""
    return [f"{key}: {old} -> {new}" for key, old, new in _differences(before, after)]


def _differences(before: Recipe, after: Recipe) -> list[tuple[str, object, object]]:
    both = [(key, _value(before, key), _value(after, key)) for key in field_names()]
    return [(key, old, new) for key, old, new in both if old != new]


def _value(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _newest(checkpoints: Checkpoints, progress: Progress) -> tuple[str, Checkpoint | None]:
    if not checkpoints.all():
        return "the beginning (the run had no checkpoint yet)", None
    path, checkpoint, problems = checkpoints.newest()
    for problem in problems:
        progress.warn(f"A damaged checkpoint was passed over: {problem}")
    if problems:
        progress.warn(f"The run goes on from the older checkpoint {path.name}; the steps since then are trained again.")
    return f"checkpoint {path.name}", checkpoint


def _plan(
    request: ResumeRequest, plan: Plan, device: torch.device, recipe: Recipe, changes: list[str], dataset: Dataset
) -> Plan:
    """The plan to go on with: the run's own, or a new one where the request or the recipe asks for it."""
    needing = [f"--set {change.partition(':')[0]}" for change in changes if not change.startswith(PLAN_IS_KEPT)]
    if str(device) != plan.device:
        needing.append(f"--device {device}")
    asked = [name for name in ("vram", "ram", "allow") if getattr(request, name) is not None]
    if not needing and not asked:
        return plan
    vram = request.vram
    if vram is None:
        if plan.budget is None:
            raise LowmemError(
                f"{(needing or [f'--{asked[0]}'])[0]}: this change needs a new plan, and the run's own names no budget. "
                f"Add --vram, as in --vram 8G."
            )
        vram = short_size(plan.budget.total_bytes)
    allow = request.allow or ("statistical" if plan.exactness == "statistical" else "rounding")
    wanted = TrainRequest(vram=vram, ram=request.ram, allow=allow)
    found = plan_for(wanted, recipe, device_spec(device), device, dataset)
    # On a CPU the number of torch's threads decides in which order sums are formed: the run keeps its own.
    loader = found.loader.model_copy(update={"torch_threads": plan.loader.torch_threads})
    return keep_kernels(found.model_copy(update={"loader": loader}), plan)


def _tell_of_last_end(lock: RunLock, folder: RunFolder, progress: Progress) -> None:
    if lock.last_end:
        progress.warn(
            f"The last part of this run {lock.last_end}. Nothing is lost but the steps since its last checkpoint."
        )
        folder.record("found_dead", how=lock.last_end)


def _tell_where_it_stands(run: Run, where: str, old_plan: Plan) -> None:
    state, say = run.state, run.progress.say
    if run.plan != old_plan:
        for line in plan_lines(run.plan):
            say(line)
    if run.plan.device != old_plan.device:
        run.progress.warn(
            f"The run began on {old_plan.device_name} and goes on on {run.plan.device_name}, which forms sums in another order: "
            f"the weights will be the same up to rounding, not bit for bit."
        )
    if state.finished:
        say(
            f"This run is finished. To go on with it: lowmem resume {run.folder.path} --set schedule.epochs={state.epoch + 9}"
        )
    else:
        say(f"Resumed from {where}: epoch {state.epoch}, step {state.step}.")


def _tell_of_edits(folder: RunFolder, recipe: Recipe, where: str, progress: Progress) -> None:
    """recipe.toml is a copy: an edit of it changes nothing, and is not kept."""
    try:
        same = folder.read_recipe() == recipe
    except LowmemError:
        same = False
    if not same:
        progress.warn(
            f"recipe.toml is not the recipe of {where}, which counts. To change the recipe, use lowmem resume --set KEY=VALUE."
        )
        folder.write_recipe(recipe, f"put back to the recipe of {where}")


def _changed_state(state: RunState, before: Recipe, recipe: Recipe) -> RunState:
    schedule = state.schedule
    if before.optimizer.lr != recipe.optimizer.lr:
        schedule = schedule.model_copy(update={"lr": recipe.optimizer.lr})
    return state.model_copy(
        update={"recipe": recipe, "schedule": schedule, "finished": state.finished and recipe == before}
    )


def _record_changes(folder: RunFolder, recipe: Recipe, state: RunState, changes: list[str]) -> None:
    folder.write_recipe(
        recipe, f"changed on purpose before step {state.step + 1} of epoch {state.epoch}: {'; '.join(changes)}"
    )
    folder.record("recipe_changed", changes=changes, epoch=state.epoch, step=state.step)
