"""From what the user typed to a run, and the run to its end."""

import re
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import Dataset, class_counts, embedded_images, open_dataset
from lowmem.data.loader import Loader
from lowmem.data.pixels import EvalPixels, TrainPixels
from lowmem.data.prepared import detail_warning, open_cache, with_prepared
from lowmem.data.shrunk import Cache
from lowmem.data.workers import open_workers
from lowmem.errors import LowmemError
from lowmem.machine import choose_device, describe, this_machine
from lowmem.memory.housekeeping import freeze_garbage, prepare_allocator, thaw_garbage
from lowmem.memory.pressure import Diagnosis, PressureWatch, SystemReader
from lowmem.planning.convolutions import choose_layouts, refuse_layouts, with_layouts
from lowmem.planning.devices import DeviceSpec, device_spec, settle_amp
from lowmem.planning.execution import fastest, refuse_compile
from lowmem.planning.explain import plan_lines
from lowmem.planning.host import Needs, needs_of, planned_within_ram, within_ram
from lowmem.planning.loading import check_wish, image_seconds, loader_for
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import Plan, load_plan
from lowmem.planning.planner import make_plan
from lowmem.profiling.result import plan_of_profile
from lowmem.progress import Progress, open_progress
from lowmem.recipe import Recipe, load_recipe
from lowmem.results.classifier import classifier_info
from lowmem.sizes import parse_size
from lowmem.training.checkpoint import Checkpoints
from lowmem.training.ema import ema_bytes
from lowmem.training.engine import Engine
from lowmem.training.folder import RunFolder, new_run_folder
from lowmem.training.interrupt import EXIT_STOPPED, StoppedError, StopRequest
from lowmem.training.keeping import save_checkpoint
from lowmem.training.lock import RunLock
from lowmem.training.loop import train
from lowmem.training.model import initialised_model
from lowmem.training.run import Run
from lowmem.training.saving import Saver
from lowmem.training.schedule import first_state
from lowmem.training.self_profile import SelfProfile
from lowmem.training.state import RunState
from lowmem.training.trial import try_execution, ways_to_try

EXIT_DONE = 0


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
    profile: Path | None = None
    allow: str = "rounding"
    checkpoint_every: str = "10m"
    loader: str = "auto"
    workers: int | None = None
    layouts: str = "default"
    compile: str = "none"
    cache: Path | None = None
    cache_bytes: str | None = None


def train_new_run(request: TrainRequest) -> int:
    """Plan and train; returns the exit code. Raises LowmemError before the first step where anything is wrong."""
    prepare_allocator()
    cadence = parse_cadence(request.checkpoint_every)
    check_wish(request.loader, request.workers)
    refuse_layouts(request.layouts, request.allow)
    recipe = load_recipe(request.recipe, request.overrides)
    device = choose_device(request.device)
    refuse_compile(request.compile, request.allow, device.type)
    spec = device_spec(device)
    recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, spec)})
    with ExitStack() as stack:
        progress = stack.enter_context(open_progress())
        cache = cache_for(recipe, request.cache, request.cache_bytes)
        dataset = open_data(recipe, request.data, progress, cache)
        plan = plan_for(request, recipe, spec, device, dataset, progress.say)
        model, loaded = initialised_model(recipe.model, len(dataset.classes), recipe.seed)
        if request.layouts == "measured":
            progress.say("Measuring convolutions in both memory layouts, each kind once on this machine ...")
            plan = with_layouts(plan, choose_layouts(FakeNetwork(recipe, len(dataset.classes)), plan, device))
        if request.compile == "measured":
            progress.say("Trying compiled blocks on this card, which may take a minute or two ...")
            ways = ways_to_try(model, recipe)
            plan = fastest(plan, try_execution(model, recipe, plan, len(dataset.classes), ways))
        folder = new_run_folder(request.out, Path(request.recipe).stem)
        stack.enter_context(RunLock(folder))
        machine = this_machine()
        state, checkpoints = first_run_state(recipe, dataset), Checkpoints(folder.checkpoints)
        run = assemble(stack, folder, checkpoints, recipe, plan, dataset, model, state, progress, cadence)
        folder.write_facts(recipe, plan, machine, dataset)
        folder.record("started", recipe=request.recipe, vram=request.vram, device=str(device), weights=str(loaded))
        progress.say(f"Machine: {describe(machine)}")
        progress.say(f"Initial weights: {loaded}")
        for line in plan_lines(plan):
            progress.say(line)
        save_checkpoint(run)
        return run_to_end(run)


def first_run_state(recipe: Recipe, dataset: Dataset) -> RunState:
    """Before the first step."""
    schedule = first_state(recipe)
    return RunState(
        recipe=recipe, epoch=1, step=0, schedule=schedule, scaler=None, seed=recipe.seed, dataset=dataset.fingerprint
    )


def parse_cadence(text: str) -> tuple[float, int]:
    """(seconds, steps) between checkpoints from "10m", "600s", "2h" or "500-steps"; the other one is endless or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(h|m|s|-steps)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise LowmemError(f"--checkpoint-every {text}: write 10m, 600s, 2h or 500-steps.")
    if match[2] == "-steps":
        return float("inf"), max(1, int(float(match[1])))
    return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]], 0


def cache_for(recipe: Recipe, folder: Path | None, limit: str | None, before: Cache | None = None) -> Cache | None:
    """Where a recipe's shrunk images are kept, `before` for a run that goes on; raises LowmemError where a place is given and the
    recipe shrinks none."""
    if recipe.data.max_side:
        return open_cache(folder, limit, before)
    for option, given in (("--cache", folder), ("--cache-bytes", limit)):
        if given is not None:
            raise LowmemError(
                f"{option}: this recipe reads images as they are, and keeps none. To train on images shrunk once, say how far, as in "
                f"--set data.max_side={2 * recipe.data.train_px} (the longer side, in pixels)."
            )
    return None


def open_data(recipe: Recipe, data: Path | None, progress: Progress, cache: Cache | None = None) -> Dataset:
    """The images of a recipe, told about and, where it says so, shrunk once into the cache (by default the user's own)."""
    root = (data or embedded_images()).resolve()
    dataset = open_dataset(root, recipe.data.val_fraction, recipe.seed, progress.checking)
    counts = dataset.train.counts(len(dataset.classes))
    progress.say(
        f"Data: {root if data else 'the embedded images (clip art)'}: {len(dataset.train)} training and {len(dataset.val)} validation "
        f"images, {len(dataset.classes)} classes of {counts.min()} to {counts.max()}"
    )
    progress.say(f"  of each class, for training + validation: {class_counts(dataset)}")
    for name, reason in dataset.unreadable:
        progress.warn(f"left out: {name}: {reason}")
    for warning in dataset.warnings:
        progress.warn(warning)
    if len(dataset.train) < recipe.batch.size:
        raise LowmemError(
            f"There are {len(dataset.train)} training images, fewer than one batch of {recipe.batch.size}. Use --set batch.size={len(dataset.train)} or less."
        )
    if not recipe.data.max_side:
        return dataset
    told = detail_warning(recipe.data)
    if told:
        progress.warn(told)
    return with_prepared(dataset, recipe.data.max_side, cache or open_cache(), progress.shrinking)


def plan_for(
    request: TrainRequest,
    recipe: Recipe,
    spec: DeviceSpec,
    device: torch.device,
    dataset: Dataset,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    if request.plan_file is not None and request.profile is not None:
        raise LowmemError("--plan and --profile both name a plan: give one of them.")
    ram = parse_size(request.ram) if request.ram else None

    def needs(plan: Plan) -> Needs:
        return needs_of(plan, recipe, len(dataset.classes), dataset.train, len(dataset.val))

    if request.profile is not None or request.plan_file is not None:
        given = (
            load_plan(request.plan_file)
            if request.plan_file
            else plan_of_profile(request.profile, recipe, str(device), spec.name, dataset)
        )
        return given if ram is None else within_ram(given, recipe, ram, needs(given))
    pixels = TrainPixels(dataset.train, recipe.augment, recipe.data.train_px, recipe.seed)
    image_s = image_seconds(pixels, len(dataset.train))

    def made(ram_bytes: int | None) -> Plan:
        plan = make_plan(
            recipe,
            spec,
            str(device),
            parse_size(request.vram),
            ram_bytes=ram_bytes,
            num_classes=len(dataset.classes),
            num_train=len(dataset.train),
            allow=request.allow,
            measure=True,
            say=say,
        )
        loader, why = loader_for(plan, recipe, spec, image_s, request.loader, request.workers)
        return plan.model_copy(update={"loader": loader, "reasons": (*plan.reasons, why)})

    return made(None) if ram is None else planned_within_ram(made, recipe, ram, needs)


def assemble(
    stack: ExitStack,
    folder: RunFolder,
    checkpoints: Checkpoints,
    recipe: Recipe,
    plan: Plan,
    dataset: Dataset,
    model: torch.nn.Module,
    state: RunState,
    progress: Progress,
    cadence: tuple[float, int],
) -> Run:
    """The objects of a run; raises LowmemError where the run folder's disk is too small for them."""
    if plan.loader.torch_threads:
        torch.set_num_threads(plan.loader.torch_threads)
    weights, buffers = (sum(t.nbytes for t in tensors) for tensors in (model.parameters(), model.buffers()))
    average = ema_bytes(model, recipe.ema)
    folder.refuse_too_small(3 * weights + buffers + average, weights + buffers)
    engine = Engine(model, recipe, plan, torch.from_numpy(dataset.train.counts(len(dataset.classes))))
    info = classifier_info(recipe, model, dataset.classes)
    data = recipe.data
    train_pixels = TrainPixels(dataset.train, recipe.augment, data.train_px, recipe.seed)
    val_pixels = EvalPixels(dataset.val, data.val_px, data.crop_frac)
    tell = partial(_tell_of_loading, folder, progress)
    workers = stack.enter_context(closing(open_workers(plan.loader, [train_pixels, val_pixels], tell)))
    norm = Normalisation(info.mean, info.std)
    return Run(
        folder=folder,
        recipe=recipe,
        plan=plan,
        dataset=dataset,
        engine=engine,
        train_loader=Loader(
            dataset.train,
            train_pixels,
            data.train_px,
            recipe.batch.size,
            plan.loader,
            recipe.seed,
            workers=workers,
            tell=tell,
        ),
        val_loader=Loader(dataset.val, val_pixels, data.val_px, plan.eval_batch, plan.loader, workers=workers),
        device_input=DeviceInput(norm, engine.device, plan.memory_format, recipe.mixup, recipe.seed),
        classifier_info=info,
        progress=progress,
        state=state,
        stop=stack.enter_context(StopRequest()),
        saver=stack.enter_context(Saver(checkpoints, partial(_record_checkpoint, folder))),
        pressure=PressureWatch(
            SystemReader(engine.device),
            partial(_tell_of_pressure, folder, progress),
            plan.budget.total_bytes if plan.budget and engine.device.type == "cuda" else None,
        ),
        profile=SelfProfile(folder.profile, plan),
        steps_per_epoch=len(dataset.train) // recipe.batch.size,
        checkpoint_every_s=cadence[0],
        checkpoint_every_steps=cadence[1],
    )


def _tell_of_pressure(folder: RunFolder, progress: Progress, found: Diagnosis) -> None:
    progress.warn(found.text)
    folder.record("memory_pressure", cause=found.cause, text=found.text)


def _tell_of_loading(folder: RunFolder, progress: Progress, text: str) -> None:
    progress.warn(text)
    folder.record("loading", text=text)


def _record_checkpoint(folder: RunFolder, path: Path, seconds: float, host_bytes: int) -> None:
    folder.record("checkpoint", path=path.name, seconds=round(seconds, 3), host_bytes=host_bytes)


def run_to_end(run: Run) -> int:
    run.progress.start(run.recipe.schedule.epochs, run.steps_per_epoch, run.state.epoch)
    freeze_garbage()
    try:
        with run.profile.running():
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
