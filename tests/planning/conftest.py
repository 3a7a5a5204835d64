"""Recipes and planning states that the tests of planning share."""

import pytest

from lowmem.planning.devices import DeviceSpec, device_by_name
from lowmem.planning.known import Planning
from lowmem.planning.plan import Budget
from lowmem.recipe import Recipe
from lowmem.sizes import GIB

CLASSES = 10


def small_recipe(name: str = "resnet26d", px: int = 128, batch: int = 16, **fields: object) -> Recipe:
    data = {"train_px": px, "val_px": px, "test_px": px}
    tree = {"model": {"name": name, "weights": "none"}, "data": data, "batch": {"size": batch}, "amp": "fp32"}
    return Recipe.model_validate(tree | fields)


def planning_for(recipe: Recipe, spec: DeviceSpec, allow: str = "rounding") -> Planning:
    budget = Budget(total_bytes=1024 * GIB)
    return Planning(recipe, spec, "cpu", budget, CLASSES, 1000, 64 * GIB, allow)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def cpu() -> DeviceSpec:
    return device_by_name("CPU")


@pytest.fixture(scope="session")
def laptop() -> DeviceSpec:
    return device_by_name("RTX 4060 laptop")
