"""From what the user typed to a run: a new one, or an earlier one to continue."""

import dataclasses
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import Dataset, embedded_images, open_dataset
from lowmem.data.loader import EvalPixels, Loader, TrainPixels
from lowmem.errors import LowmemError
from lowmem.machine import choose_device, describe, this_machine
from lowmem.memory.housekeeping import freeze_garbage, prepare_allocator, thaw_garbage
from lowmem.planning.devices import DeviceSpec, device_spec, settle_amp
from lowmem.planning.explain import plan_lines
from lowmem.planning.plan import Plan, load_plan
from lowmem.planning.planner import make_plan
from lowmem.progress import Progress, open_progress
from lowmem.recipe import Recipe, load_recipe, with_overrides
from lowmem.results.classifier import classifier_info
from lowmem.sizes import parse_size
from lowmem.training.checkpoint import RunState, newest_checkpoint
from lowmem.training.engine import Engine
from lowmem.training.folder import RunFolder, RunLock, new_run_folder, open_run_folder
from lowmem.training.interrupt import StopRequest
from lowmem.training.loop import train
from lowmem.training.model import build_model, initialised_model
from lowmem.training.run import Run, StoppedError
from lowmem.training.schedule import first_state

EXIT_DONE, EXIT_STOPPED = 0, 130


@dataclass(frozen=True)
class TrainRequest:
    """The options of `lowmem train`."""

    recipe: str = "quickstart"
    data: Path | None = None
    vram: str = "8G"
    ram: str | None = None
    device: str = "auto"
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    plan_file: Path | None = None
    allow: str = "rounding"
    checkpoint_every: str = "10m"


def train_new_run(request: TrainRequest) -> int:
    """Plan and train; returns the exit code. Raises LowmemError before the first step where anything is wrong."""
    prepare_allocator()
    every_s, every_steps = parse_cadence(request.checkpoint_every)
    recipe = load_recipe(request.recipe, request.overrides)
    device = choose_device(request.device)
    spec = device_spec(device)
    recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, spec)})
    with ExitStack() as stack:
        progress = stack.enter_context(open_progress())
        dataset = _open_data(recipe, request.data, progress)
        plan = _plan(request, recipe, spec, device, dataset)
        model, loaded = initialised_model(recipe.model, len(dataset.classes), recipe.seed)
        folder = new_run_folder(request.out, Path(request.recipe).stem)
        stack.enter_context(RunLock(folder))
        machine = this_machine()
        folder.write_facts(recipe, plan, machine, dataset)
        folder.record("started", recipe=request.recipe, vram=request.vram, device=str(device), weights=str(loaded))
        progress.say(f"Machine: {describe(machine)}")
        progress.say(f"Initial weights: {loaded}")
        for line in plan_lines(plan):
            progress.say(line)
        state = RunState(
            epoch=1, step=0, schedule=first_state(recipe), scaler=None, seed=recipe.seed, dataset=dataset.fingerprint
        )
        run = _assemble(stack, folder, recipe, plan, dataset, model, state, progress, every_s, every_steps)
        return _train(run)


def resume_run(
    path: Path, vram: str | None, data: Path | None, overrides: tuple[str, ...], checkpoint_every: str
) -> int:
    """Continue an earlier run from its newest good checkpoint; returns the exit code."""
    prepare_allocator()
    every_s, every_steps = parse_cadence(checkpoint_every)
    folder = open_run_folder(path)
    recipe, plan = folder.read_recipe(), folder.read_plan()
    with ExitStack() as stack:
        progress = stack.enter_context(open_progress())
        stack.enter_context(RunLock(folder))
        where, checkpoint, problems = newest_checkpoint(folder.checkpoints)
        for problem in problems:
            progress.warn(f"A damaged checkpoint was passed over: {problem}")
        if overrides:
            recipe = with_overrides(recipe, overrides)
            folder.recipe.write_text(recipe.to_toml(), encoding="utf-8")
            folder.record(
                "recipe_changed", overrides=list(overrides), epoch=checkpoint.state.epoch, step=checkpoint.state.step
            )
        dataset = _open_data(recipe, data or folder.data_root(), progress)
        folder.check_same_data(dataset, checkpoint.state.dataset)
        if vram is not None:
            request = TrainRequest(vram=vram)
            plan = _plan(request, recipe, device_spec(torch.device(plan.device)), torch.device(plan.device), dataset)
            plan.save(folder.plan)
        folder.record("resumed", checkpoint=where.name, vram=vram)
        state = checkpoint.state
        if any(item.startswith("optimizer.lr") for item in overrides):
            state = state.model_copy(update={"schedule": state.schedule.model_copy(update={"lr": recipe.optimizer.lr})})
        state = state.model_copy(update={"finished": False})
        model = build_model(recipe.model, len(dataset.classes))
        run = _assemble(stack, folder, recipe, plan, dataset, model, state, progress, every_s, every_steps)
        run.restore(dataclasses.replace(checkpoint, state=state))
        progress.say(f"Resumed from checkpoint {where.name}: epoch {state.epoch}, step {state.step}.")
        return _train(run)


def parse_cadence(text: str) -> tuple[float, int]:
    """(seconds, steps) between checkpoints from "10m", "600s", "2h" or "500-steps"; the other one is endless or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(h|m|s|-steps)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise LowmemError(f"--checkpoint-every {text}: write 10m, 600s, 2h or 500-steps.")
    if match[2] == "-steps":
        return float("inf"), max(1, int(float(match[1])))
    return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]], 0


def _open_data(recipe: Recipe, data: Path | None, progress: Progress) -> Dataset:
    root = (data or embedded_images()).resolve()
    dataset = open_dataset(root, recipe.data.val_fraction, recipe.seed, progress.checking)
    counts = dataset.train.counts(len(dataset.classes))
    progress.say(
        f"Data: {root if data else 'the embedded images (clip art)'}: {len(dataset.train)} training and {len(dataset.val)} validation "
        f"images, {len(dataset.classes)} classes of {counts.min()} to {counts.max()}"
    )
    for name, reason in dataset.unreadable:
        progress.warn(f"left out: {name}: {reason}")
    for warning in dataset.warnings:
        progress.warn(warning)
    if len(dataset.train) < recipe.batch.size:
        raise LowmemError(
            f"There are {len(dataset.train)} training images, fewer than one batch of {recipe.batch.size}. Use --set batch.size={len(dataset.train)} or less."
        )
    return dataset


def _plan(request: TrainRequest, recipe: Recipe, spec: DeviceSpec, device: torch.device, dataset: Dataset) -> Plan:
    if request.plan_file is not None:
        return load_plan(request.plan_file)
    ram = parse_size(request.ram) if request.ram else None
    return make_plan(
        recipe,
        spec,
        str(device),
        parse_size(request.vram),
        ram_bytes=ram,
        num_classes=len(dataset.classes),
        num_train=len(dataset.train),
        allow=request.allow,
    )


def _assemble(
    stack: ExitStack,
    folder: RunFolder,
    recipe: Recipe,
    plan: Plan,
    dataset: Dataset,
    model: torch.nn.Module,
    state: RunState,
    progress: Progress,
    every_s: float,
    every_steps: int,
) -> Run:
    if plan.loader.torch_threads:
        torch.set_num_threads(plan.loader.torch_threads)
    engine = Engine(model, recipe, plan, torch.from_numpy(dataset.train.counts(len(dataset.classes))))
    info = classifier_info(recipe, model, dataset.classes)
    data = recipe.data
    train_pixels = TrainPixels(dataset.train, recipe.augment, data.train_px, recipe.seed)
    val_pixels = EvalPixels(dataset.val, data.val_px, data.crop_frac)
    norm = Normalisation(info.mean, info.std)
    return Run(
        folder=folder,
        recipe=recipe,
        plan=plan,
        dataset=dataset,
        engine=engine,
        train_loader=stack.enter_context(
            Loader(dataset.train, train_pixels, data.train_px, recipe.batch.size, plan.loader, recipe.seed)
        ),
        val_loader=stack.enter_context(Loader(dataset.val, val_pixels, data.val_px, plan.eval_batch, plan.loader)),
        device_input=DeviceInput(norm, engine.device, plan.memory_format, recipe.mixup, recipe.seed),
        classifier_info=info,
        progress=progress,
        state=state,
        stop=stack.enter_context(StopRequest()),
        steps_per_epoch=len(dataset.train) // recipe.batch.size,
        checkpoint_every_s=every_s,
        checkpoint_every_steps=every_steps,
    )


def _train(run: Run) -> int:
    run.progress.start(run.recipe.schedule.epochs, run.steps_per_epoch, run.state.epoch)
    freeze_garbage()
    try:
        train(run)
    except StoppedError:
        run.progress.close()
        run.progress.say(
            f"Stopped after step {run.state.step} of epoch {run.state.epoch}. Continue with: lowmem resume {run.folder.path}"
        )
        return EXIT_STOPPED
    finally:
        thaw_garbage()
    best = run.state.schedule
    run.progress.close()
    run.progress.say(
        f"Best epoch {best.best_epoch}: validation accuracy {best.best_accuracy:.4f}, loss {best.best_accuracy_loss:.4f}"
    )
    run.progress.say(f"Classifier: {run.folder.classifier}   Report: {run.folder.path / 'report.html'}")
    return EXIT_DONE
