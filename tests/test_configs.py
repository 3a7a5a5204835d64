"""Every recipe of the experiment: what its table says, what its header says, and that it plans and trains."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import Dataset, open_dataset
from lowmem.data.loader import Loader
from lowmem.data.pixels import TrainPixels
from lowmem.planning.devices import device_by_name
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe, load_recipe, recipe_names, recipe_summary
from lowmem.sizes import GIB
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import describe_configs  # noqa: E402

TABLE = {
    "resnet18": ("resnet18", 0.0, True, 1e-3, 4, 224, 224, 64, 0, 0.0),
    "resnet50": ("resnet50", 0.5, False, 1e-3, 4, 224, 224, 64, 0, 0.0),
    "resnet50.tf_in1k": ("resnet50.tv_in1k", 0.2, True, 1e-3, 4, 224, 224, 32, 0, 0.0),
    "resnet101": ("resnet101", 0.5, False, 1e-3, 4, 224, 224, 64, 0, 0.0),
    "resnext50_32x4d": ("resnext50_32x4d", 0.5, False, 1e-3, 4, 224, 224, 64, 0, 0.0),
    "resnext50_32x4d-sharpen": ("resnext50_32x4d", 0.5, False, 1e-3, 4, 224, 224, 64, 0, 0.0),
    "seresnext50_32x4d": ("seresnext50_32x4d", 0.5, False, 1e-3, 3, 224, 224, 64, 0, 0.0),
    "seresnext50_32x4d-288": ("seresnext50_32x4d", 0.5, False, 1e-3, 3, 224, 288, 64, 0, 0.0),
    "seresnext50_32x4d-320": ("seresnext50_32x4d", 0.2, True, 1e-3, 3, 320, 320, 32, 0, 0.0),
    "seresnet152d.ra2_in1k": ("seresnet152d.ra2_in1k", 0.5, True, 1e-5, 3, 256, 320, 32, 10, 0.0),
    "seresnet152d.ra2_in1k-mixup": ("seresnet152d.ra2_in1k", 0.5, True, 1e-3, 3, 256, 320, 32, 10, 0.5),
    "resnet152d.ra2_in1k": ("resnet152d.ra2_in1k", 0.5, True, 1e-5, 3, 256, 320, 32, 10, 0.0),
    "seresnextaa101d_32x8d": ("seresnextaa101d_32x8d", 0.5, True, 5e-5, 2, 224, 320, 32, 10, 0.5),
    "seresnextaa101d_32x8d-288": ("seresnextaa101d_32x8d", 0.5, True, 5e-5, 2, 224, 288, 32, 10, 0.5),
    "seresnextaa101d_32x8d-plain": ("seresnextaa101d_32x8d", 0.5, True, 5e-5, 2, 224, 288, 32, 0, 0.0),
    "seresnextaa101d_32x8d-warmup3": ("seresnextaa101d_32x8d", 0.5, True, 5e-5, 2, 224, 320, 32, 3, 0.0),
    "seresnextaa101d_32x8d-mixup1": ("seresnextaa101d_32x8d", 0.5, True, 5e-5, 2, 224, 320, 32, 5, 1.0),
}
"""model, dropout, augmented, lr, stale epochs before a decay, training px, test px, batch, warm-up, mixup."""
ON_EVERY_PUSH = ("resnet18", "resnext50_32x4d-sharpen")
EACH = [name if name in ON_EVERY_PUSH else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
SMALL = ("model.weights=none", "data.train_px=64", "batch.size=2", "amp=fp32", "optimizer.lr=1e-4")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for index in range(4):
            Image.fromarray(random.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(root / label / f"{index}.png")
    return open_dataset(root, 0.25, seed=0)


def test_the_recipes_are_those_of_the_table() -> None:
    assert set(recipe_names()) == {"quickstart", *TABLE}
    for name, row in TABLE.items():
        recipe = load_recipe(name)
        data, augment, schedule = recipe.data, recipe.augment, recipe.schedule
        found = (
            recipe.model.name,
            recipe.model.dropout,
            augment.blur_prob == 1.0,
            recipe.optimizer.lr,
            schedule.patience,
        )
        found += (data.train_px, data.test_px, recipe.batch.size, schedule.warmup_epochs, recipe.mixup.prob)
        assert found == row, name
        assert (
            data.val_px == data.test_px and recipe.optimizer.weight_decay == 1e-3 and recipe.mixup.alpha in (1.0, 1.3)
        )
    assert (
        load_recipe("resnext50_32x4d-sharpen").augment.sharpen_prob
        > load_recipe("resnext50_32x4d").augment.sharpen_prob
        == 0
    )
    assert load_recipe("resnet50").augment.crop_scale == (1.0, 1.0)


@pytest.mark.parametrize("name", TABLE)
def test_the_header_says_what_it_is(name: str) -> None:
    lines = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    header = lines[: lines.index("")]
    assert all(line.startswith("#") and len(line) <= 140 for line in header) and len(recipe_summary(name)) < 100
    assert f"#   lowmem train --recipe {name} --data photos/ --vram 8G" == header[-1]
    assert any("the experiment" in line.lower() and "score" in line or "accuracy 0.9633" in line for line in header)
    assert len([line for line in header if describe_configs.LINE.fullmatch(line)]) == 2
    assert [line for line in lines if line.startswith("base = ")], "common parts are inherited"


def test_the_smallest_recipes_figures_are_not_stale() -> None:
    assert describe_configs.stale_figures("resnet18") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_no_figure_is_stale(name: str) -> None:
    assert describe_configs.stale_figures(name) == []


def test_a_stale_figure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.replace("peak 0.", "peak 1.") for line in describe_configs.figures("resnet18")]
    monkeypatch.setattr(describe_configs, "_header", lambda name: lines)
    told = describe_configs.stale_figures("resnet18")
    assert len(told) == 2 and all("GiB" in line and "resnet18" in line for line in told)
    monkeypatch.setattr(describe_configs, "_header", lambda name: lines[:1])
    assert "no figures" in describe_configs.stale_figures("resnet18")[0]


@pytest.mark.parametrize("name", EACH)
def test_it_plans_in_8_gigabytes_and_trains(name: str, photos: Dataset) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, device_by_name("RTX 4060 laptop"), "cuda:0", 8 * GIB, num_classes=100, num_train=20_700)
    assert plan.exactness == "bitwise" and plan.prediction.peak.total <= plan.budget.tensor_bytes < 8 * GIB
    losses = list(two_steps(load_recipe(name, SMALL), photos))
    assert len(losses) == 2 and all(0.01 < loss < 20 for loss in losses)


def two_steps(recipe: Recipe, dataset: Dataset) -> Iterator[float]:
    """The losses of the recipe's own images, augmentation, mixup, loss and optimizer."""
    loading = LoaderPlan(kind="inline", workers=0)
    plan = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=recipe.batch.size, loader=loading)
    model, _ = initialised_model(recipe.model, len(dataset.classes), recipe.seed)
    engine = Engine(model, recipe, plan, torch.from_numpy(dataset.train.counts(len(dataset.classes))))
    device_input = DeviceInput(
        Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, plan.memory_format, recipe.mixup, 0
    )
    pixels = TrainPixels(dataset.train, recipe.augment, recipe.data.train_px, recipe.seed)
    with Loader(dataset.train, pixels, recipe.data.train_px, recipe.batch.size, loading, recipe.seed) as loader:
        for step, batch in zip(range(2), loader.batches(1, 0)):
            yield float(engine.train_step(batch, device_input, epoch=1, step=step, lr=recipe.optimizer.lr))
