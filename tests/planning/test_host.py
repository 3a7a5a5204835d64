"""What the host budget counts, and what it takes away before it refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lowmem.budgeting import PlanRequest, show_plan
from lowmem.data.split import packed_split
from lowmem.errors import LowmemError
from lowmem.planning.host import (
    ASSUMED_PHOTO_BYTES,
    Needs,
    decoded_bytes,
    host_lines,
    largest_photo_bytes,
    needs_of,
    within_ram,
)
from lowmem.planning.plan import LoaderPlan, MemoryBreakdown, Plan, Prediction
from lowmem.recipe import load_recipe
from lowmem.sizes import GIB, MIB

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
    assert "host memory" not in shown(None)[1]
    with pytest.raises(LowmemError, match="--ram 100M is too small"):
        shown("100M")
