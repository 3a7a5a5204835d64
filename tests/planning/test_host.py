"""What the host budget counts, and what it takes away before it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from lowmem.budgeting import PlanRequest, show_plan
from lowmem.data.folder import open_dataset
from lowmem.data.split import packed_split
from lowmem.errors import LowmemError
from lowmem.planning.devices import device_by_name
from lowmem.planning.host import (
    ASSUMED_PHOTO_BYTES,
    Needs,
    decoded_bytes,
    host_lines,
    largest_photo_bytes,
    needs_of,
    planned_within_ram,
    within_ram,
)
from lowmem.planning.plan import LoaderPlan, MemoryBreakdown, Plan, Prediction
from lowmem.recipe import load_recipe
from lowmem.sizes import GIB, MIB
from lowmem.training.start import TrainRequest, plan_for

RECIPE = load_recipe("seresnextaa101d_32x8d")
NEEDS = Needs(photo_bytes=9 * MIB)


def plan(device="cuda:0", **loader):
    peak = MemoryBreakdown(weights=400 * MIB, activations=100 * MIB)
    prediction = Prediction(peak=peak, host_bytes=2 * GIB, step_s=0.4)
    return Plan(
        device=device,
        device_name="card",
        amp_dtype="bf16",
        micro_batch=32,
        loader=LoaderPlan(**loader),
        prediction=prediction,
    )


def total(*arguments):
    return sum(line.num_bytes for line in host_lines(*arguments))


def test_everything_is_counted_and_workers_and_batches_go_before_it_is_refused():
    rich = plan(kind="processes", workers=4, prefetch_batches=3)
    told = " ".join(line.what for line in host_lines(rich, RECIPE, NEEDS))
    parts = ("program", "4 loader processes", "4 decoded photographs", "batches", "offloaded", "checkpoints")
    assert all(part in told for part in parts)
    needed = total(rich, RECIPE, NEEDS)
    kept = within_ram(rich, RECIPE, needed + 64 * MIB, NEEDS)
    assert kept.loader == rich.loader and kept.host.total_bytes == needed + 64 * MIB
    leaner = within_ram(rich, RECIPE, needed - 150 * MIB, NEEDS)
    assert leaner.loader.prefetch_batches < 3 and "no room for more" in leaner.reasons[-1]
    assert leaner.host.num_bytes <= needed - 150 * MIB
    with pytest.raises(LowmemError, match=r"--ram 1G is too small: .*offloaded tensors.*Use --ram \d+M"):
        within_ram(rich, RECIPE, GIB, NEEDS)


def test_each_need_adds_what_it_is():
    base = plan(kind="threads", workers=2)
    apart = total(base, RECIPE, Needs(photo_bytes=90 * MIB)) - total(base, RECIPE, NEEDS)
    assert apart == 2 * 81 * MIB  # two workers, a photograph each
    on_cpu = plan("cpu", kind="threads", workers=2)
    larger = total(on_cpu, RECIPE, Needs(9 * MIB, evaluation_bytes=3 * GIB)) - total(on_cpu, RECIPE, NEEDS)
    assert larger >= 3 * GIB - 500 * MIB
    assert abs(total(base, RECIPE, Needs(9 * MIB, evaluation_bytes=3 * GIB)) - total(base, RECIPE, NEEDS)) < MIB


def test_workers_that_may_be_added_are_counted_and_held_to_what_there_is_room_for():
    growing = plan(kind="processes", workers=2, max_workers=6)
    steady = plan(kind="processes", workers=2)
    needed, least = total(growing, RECIPE, NEEDS), total(steady, RECIPE, NEEDS)
    each = (needed - least) // 4
    assert each > 9 * MIB and "2 loader processes of at most 6" in str(host_lines(growing, RECIPE, NEEDS))
    assert within_ram(growing, RECIPE, needed + 64 * MIB, NEEDS).loader == growing.loader
    held = within_ram(growing, RECIPE, least + 2 * each + each // 2, NEEDS)
    assert held.loader == growing.loader.model_copy(update={"max_workers": 4})
    assert held.reasons[-1].startswith("2 loader processes of at most 4 instead of 2 loader processes of at most 6:")


def test_less_is_offloaded_where_loading_has_no_room_beside_it():
    def made(ram_bytes):
        found = plan(kind="threads", workers=2)
        held = min(2 * GIB, ram_bytes)
        return found.model_copy(update={"prediction": found.prediction.model_copy(update={"host_bytes": held})})

    ram = total(made(2 * GIB), RECIPE, NEEDS) - GIB
    kept = planned_within_ram(made, RECIPE, ram, lambda plan: NEEDS)
    assert 0.8 * GIB < kept.prediction.host_bytes < 1.1 * GIB and kept.host.num_bytes <= ram
    assert kept.loader == plan(kind="threads", workers=2).loader
    with pytest.raises(LowmemError, match="--ram 64M is too small: .*offloaded tensors and optimizer 64.0 MiB"):
        planned_within_ram(made, RECIPE, 64 * MIB, lambda plan: NEEDS)

    def cannot(ram_bytes):
        if ram_bytes < ram:
            raise LowmemError("--vram")
        return made(2 * GIB)

    with pytest.raises(LowmemError, match="--ram"):
        planned_within_ram(cannot, RECIPE, ram, lambda plan: NEEDS)


def test_a_plan_that_is_given_keeps_to_the_ram_too(tmp_path: Path):
    for index in range(16):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
    dataset = open_dataset(tmp_path / "photos", 0.2, 0, cache_dir=tmp_path)
    spec, cpu = device_by_name("cpu"), torch.device("cpu")
    plan("cpu", kind="threads", workers=2).save(tmp_path / "plan.json")

    def planned(ram):
        request = TrainRequest(plan_file=tmp_path / "plan.json", ram=ram)
        return plan_for(request, load_recipe("quickstart", ("model.weights=none",)), spec, cpu, dataset)

    assert planned("20G").host.num_bytes > GIB and planned(None).host is None
    with pytest.raises(LowmemError, match="--ram 1G is too small"):
        planned("1G")


def test_photographs_are_measured_by_their_headers_and_shrunk_ones_by_their_limit(tmp_path: Path):
    for name, size in (("a.png", (40, 30)), ("b.png", (400, 300))):
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "c.png").write_text("no image")
    split = packed_split(tmp_path, ["a.png", "b.png", "c.png"], [0, 1, 0])
    assert largest_photo_bytes(split, RECIPE) == 4 * 400 * 300
    card = plan(kind="threads", workers=1)
    assert needs_of(card, RECIPE, 10).photo_bytes == ASSUMED_PHOTO_BYTES
    shrinks = load_recipe("seresnextaa101d_32x8d", ("data.max_side=320",))
    assert needs_of(card, shrinks, 10, split).photo_bytes == 4 * 320 * 320


@pytest.mark.parametrize(
    ("scale", "progressive", "expected"),
    [(0.25, False, 4 / 16), (0.08, False, 4 / 4), (1e-3, False, 4), (0.08, True, 3 + 4 / 4)],
)
def test_a_jpeg_is_decoded_at_the_scale_that_the_smallest_crop_asks_for(tmp_path: Path, scale, progressive, expected):
    recipe = load_recipe("seresnextaa101d_32x8d", (f"augment.crop_scale=[{scale}, 1.0]", "data.train_px=224"))
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg", progressive=progressive)
    with Image.open(tmp_path / "a.jpg") as image:
        assert decoded_bytes(image, recipe) == expected * 4000 * 3000


def test_an_evaluation_larger_than_the_step_counts():
    recipe = load_recipe("resnet18", ("model.weights=none", "data.train_px=32", "data.val_px=128", "batch.size=4"))
    small, large = (needs_of(plan("cpu").model_copy(update={"eval_batch": size}), recipe, 10) for size in (8, 64))
    assert large.evaluation_bytes > 4 * small.evaluation_bytes - 4 * 50 * MIB
    assert needs_of(plan(), recipe, 10).evaluation_bytes == 0


def test_lowmem_plan_counts_loading_too(tmp_path: Path):
    def shown(ram):
        request = PlanRequest(
            "resnet18", "1G", ram, "cpu", None, ("data.train_px=32", "batch.size=4"), "rounding", 10, 100
        )
        console = Console(record=True, width=200)
        made = show_plan(request, None, console)
        return made, console.export_text()

    made, text = shown("8G")
    assert "host memory" in text and all(line.what in text for line in made.host.lines)
    assert "host memory" not in shown(None)[1] and "What an image costs is assumed" in shown(None)[1]
    with pytest.raises(LowmemError, match="--ram 100M is too small"):
        shown("100M")
