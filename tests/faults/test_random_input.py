"""F16: whatever is typed as recipe, override or budget: a recipe or a plan, or a LowmemError that names the key."""

import math
import tomllib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.errors import LowmemError
from lowmem.machine import choose_device
from lowmem.planning.devices import device_spec
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe, field_names, load_recipe, recipe_from_tree, with_overrides
from lowmem.sizes import parse_size
from lowmem.training.start import parse_cadence

KEYS = field_names()
VALUES = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=20),
    st.none(),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=5)), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=2),
)
SECTIONS = sorted({key.partition(".")[0] for key in KEYS})
TREES = st.dictionaries(
    st.one_of(st.sampled_from(SECTIONS), st.text(max_size=10)),
    st.one_of(VALUES, st.dictionaries(st.one_of(st.sampled_from([k.rpartition(".")[2] for k in KEYS]), st.text(max_size=8)), VALUES)),
    max_size=4,
)  # fmt: skip
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(st.sampled_from(KEYS), st.one_of(st.text(max_size=20), VALUES.map(str)))
def test_overrides(key: str, value: str) -> None:
    try:
        recipe = load_recipe("quickstart", (f"{key}={value}",))
    except LowmemError as error:
        assert key.rpartition(".")[2] in str(error) or key.partition(".")[0] in str(error)
    else:
        assert tomllib.loads(recipe.to_toml()) and with_overrides(recipe, ()) == recipe


@many
@given(st.text(max_size=30), st.text(max_size=20))
def test_overrides_of_anything(key: str, value: str) -> None:
    try:
        load_recipe("quickstart", (f"{key}={value}",))
    except LowmemError as error:
        assert "--set" in str(error) or key in str(error)


@many
@given(TREES)
def test_recipes(tree: dict[str, Any]) -> None:
    try:
        recipe = recipe_from_tree(tree, "the test")
    except LowmemError as error:
        assert "the test" in str(error) and ("model" in str(error) or any(str(key) in str(error) for key in tree))
    else:
        assert isinstance(recipe, Recipe)


@many
@given(st.text(max_size=20))
def test_budgets_and_cadences_as_text(text: str) -> None:
    for parse in (parse_size, parse_cadence):
        try:
            found = parse(text)
        except LowmemError as error:
            assert text.strip()[:5] in str(error) or repr(text)[:5] in str(error)
        else:
            assert all(
                number >= 0 and not math.isnan(number) for number in (found if isinstance(found, tuple) else (found,))
            )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 12),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([16, 32, 33]),
    st.sampled_from(["1", "64K", "5M", "8M", "20M", "1G", "900T"]),
    st.sampled_from(["bitwise", "rounding", "statistical"]),
)
def test_plans(size: int, norm_batch: int | None, px: int, vram: str, allow: str) -> None:
    try:
        norm = () if norm_batch is None else (f"batch.norm_batch={norm_batch}",)
        recipe = load_recipe(
            "quickstart",
            ("model.name=test_resnet", "model.weights=none", f"batch.size={size}", f"data.train_px={px}", f"data.val_px={px}", f"data.test_px={px}", "amp=fp32", *norm),
        )  # fmt: skip
        plan = make_plan(
            recipe, device_spec(choose_device("cpu")), "cpu", parse_size(vram), num_classes=3, num_train=30, allow=allow
        )
    except LowmemError as error:
        assert any(word in str(error) for word in ("--vram", "norm_batch", "size", "is not a size"))
    else:
        assert plan.prediction is not None and plan.prediction.peak.total <= parse_size(vram)


@pytest.mark.parametrize("text", ["1e400", "nan", "-inf", "9" * 400, "٣G", "0x"])
def test_numbers_that_trip_parsers(text: str) -> None:
    for key in ("optimizer.lr", "batch.size", "seed", "schedule.epochs"):
        with pytest.raises(LowmemError, match=key.rpartition(".")[2]):
            load_recipe("quickstart", (f"{key}={text}",))
