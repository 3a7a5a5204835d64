"""The choice of layouts: exact on times that are made up, and measured once on a machine."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.errors import LowmemError
from lowmem.planning import convolutions
from lowmem.planning.convolutions import (
    LAYOUTS,
    Choice,
    Convolution,
    LayoutTimes,
    cheapest_layouts,
    choose_layouts,
    convolutions_of,
    load_layout_times,
    refuse_layouts,
    with_layouts,
)
from lowmem.planning.execution import keep_kernels
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import Budget, MemoryBreakdown, Plan, Prediction
from lowmem.recipe import load_recipe

RECIPE = load_recipe(
    "quickstart", ("model.name=test_resnet", "model.weights=none", "batch.size=2", "data.train_px=32", "amp=fp32")
)
PLAN = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=2)


def kind(number: int) -> Convolution:
    return Convolution((1, number, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1, "float32")


def problem(seed: int, num: int = 6) -> tuple[list[tuple[str, list[Convolution]]], dict[str, int], LayoutTimes]:
    random = np.random.default_rng(seed)
    blocks = [(f"b{n}", [kind(2 * n), kind(2 * n + 1)]) for n in range(num)]
    seconds = {k.key: {name: float(random.uniform(1, 3)) for name in LAYOUTS} for _, ks in blocks for k in ks}
    return blocks, {f"b{n}": int(random.integers(1, 100)) for n in range(num)}, LayoutTimes(seconds, 0.02)


def cost(layouts: tuple[str, ...], blocks: list, input_bytes: dict[str, int], times: LayoutTimes) -> float:
    total, before = 0.0, "channels_last"
    for (path, kinds), name in zip(blocks, layouts):
        total += sum(times.seconds[k.key][name] for k in kinds) + (name != before) * 0.02 * input_bytes[path]
        before = name
    return total


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_cheapest_of_all(seed: int) -> None:
    blocks, input_bytes, times = problem(seed)
    every = {c: cost(c, blocks, input_bytes, times) for c in itertools.product(LAYOUTS, repeat=len(blocks))}
    best, default = min(every.values()), every[("channels_last",) * len(blocks)]
    found = cheapest_layouts(blocks, input_bytes, times, "channels_last")
    assert found.default_s == pytest.approx(default)
    if best > (1 - convolutions.MIN_GAIN_FRAC) * default:
        assert found.layouts == {} and found.gain == 1
    else:
        assert found.chosen_s == pytest.approx(best) == pytest.approx(every[tuple(found.layouts.values())])
        assert found.converted_bytes > 0


def test_conversions_that_cost_more_than_they_gain_are_left_out() -> None:
    blocks, input_bytes, times = problem(0)
    assert cheapest_layouts(blocks, input_bytes, times, "channels_last").layouts
    times.convert_s_per_byte = 1e6
    assert not cheapest_layouts(blocks, input_bytes, times, "channels_last").layouts


def test_every_convolution_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, path, device = FakeNetwork(RECIPE, 3), tmp_path / "a" / "times.json", torch.device("cpu")
    found, input_bytes = convolutions_of(network, PLAN)
    distinct = {k for name, kinds in found.items() if name for k in kinds}
    assert len(distinct) >= 8 and all(input_bytes.values()) and found[""], "the stem is no block"
    first = choose_layouts(network, PLAN, device, path)
    kept = json.loads(path.read_text())
    assert set(kept["seconds"]) == {k.key for k in distinct} and kept["convert_s_per_byte"] > 0
    assert all(row[name] > 0 for row in kept["seconds"].values() for name in LAYOUTS)
    monkeypatch.setattr(convolutions, "_measure", lambda *_: pytest.fail("measured again"))
    assert choose_layouts(network, PLAN, device, path) == first
    path.write_text("{")
    assert not load_layout_times(path).seconds


def test_a_plan_takes_them_where_there_is_room_and_says_so() -> None:
    choice = Choice({"layer1.0": "contiguous"}, 0.8, 1.0, converted_bytes=1000)
    prediction = Prediction(peak=MemoryBreakdown(activations=10_000))
    roomy = with_layouts(
        PLAN.model_copy(update={"budget": Budget(total_bytes=12_000), "prediction": prediction}), choice
    )
    assert roomy.layouts == choice.layouts and roomy.exactness == "rounding" and "-20.0%" in roomy.reasons[-1]
    assert roomy.prediction and roomy.prediction.peak.total == 11_000
    tight = with_layouts(
        PLAN.model_copy(update={"budget": Budget(total_bytes=10_500), "prediction": prediction}), choice
    )
    assert not tight.layouts and tight.exactness == "bitwise" and "1000 B more" in tight.reasons[-1]
    assert "faster" in with_layouts(PLAN, Choice({}, 1.0, 1.0)).reasons[-1]
    assert keep_kernels(PLAN, roomy).layouts == choice.layouts and keep_kernels(PLAN, PLAN) == PLAN


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(LowmemError, match="give default or measured"):
        refuse_layouts("nhwc", "rounding")
    with pytest.raises(LowmemError, match="--allow bitwise rules out"):
        refuse_layouts("measured", "bitwise")
    refuse_layouts("default", "bitwise")
