"""Benches side by side: made from one real row, with step times that are known."""

import pytest

from lowmem.benchmarking.calibration import calibrate, geometric_mean
from lowmem.benchmarking.compare import compare
from lowmem.benchmarking.compare_page import comparison_page, terminal_table
from lowmem.benchmarking.result import BenchFile, Memory, Round, Row
from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.planning.devices import device_by_name
from lowmem.planning.planner import make_plan
from lowmem.recipe import load_recipe
from lowmem.results.page import page_html, write_page
from lowmem.sizes import GIB
from tests.browser import opened

RECIPE = load_recipe("quickstart", ("model.name=test_resnet", "model.weights=none", "data.train_px=64", "batch.size=8"))


def roofline_s(name):
    plan = make_plan(RECIPE, device_by_name(name), "cuda", 2 * GIB, num_classes=10, num_train=800)
    return plan.prediction.step_s


def bench_of(name, step_s, path, **changes):
    """A bench of a card that took `step_s` a step in 2G, and that refused 1M."""
    rounds = tuple(Round(num_steps=10, seconds=10 * step_s * (1 + 0.001 * n)) for n in range(-2, 3))
    measured = Row(device="cuda:0", device_name=name, budget_bytes=2 * GIB, outcome="measured", rounds=rounds, memory=Memory(peak_bytes=10**7))  # fmt: skip
    refused = Row(
        device="cuda:0", device_name=name, budget_bytes=2**20, outcome="refused", reason="too small: use more"
    )
    facts = {"command": "lowmem bench", "started": "2026-01-01", "finished": True, "machine": this_machine(), "torch_threads": 1, "recipe_name": "x", "recipe": RECIPE, "num_classes": 10, "num_images": 800, "data": "synthetic", "rows": (measured, refused)}  # fmt: skip
    BenchFile(**facts | changes).save(path)
    return path


@pytest.fixture(scope="module")
def two_cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benches")
    return [
        bench_of("NVIDIA GeForce RTX 3090", 2.0 * roofline_s("RTX 3090"), folder / "a.json"),
        bench_of("Tesla T4", 3.0 * roofline_s("T4"), folder / "b.json"),
    ]


@pytest.fixture(scope="module")
def found(two_cards):
    return compare(two_cards, others=("H100",))


def test_predictions_are_calibrated_on_what_was_measured(found):
    calibration = found.calibrations["cuda"]
    assert calibration.factor == pytest.approx(6**0.5, rel=0.01) and calibration.basis == "devices"
    assert calibration.error_frac == pytest.approx(0.5, abs=0.01)  # 3 from 2: off by half of 2
    predicted = [entry for entry in found.entries if not entry.measured]
    assert {entry.device for entry in predicted} == {"H100"}
    in_two = next(entry for entry in predicted if entry.budget_bytes == 2 * GIB)
    assert in_two.step_s == pytest.approx(6**0.5 * roofline_s("H100"), rel=0.01)


def test_measured_and_predicted_cannot_be_confused(found):
    page = comparison_page(found)
    text = page_html(page)
    assert text.count('<tr class="faint">') >= 1 and "predicted, not measured" in text and "calibrated roofline" in text
    table = page.sections[2].parts[0]
    assert [table.rows[number][0] for number in table.faint] == ["H100"] * len(table.faint)
    assert found.missing[0][1:] == (2**20, "too small: use more")
    assert len(terminal_table(found).rows) == len(table.rows)


def test_the_epoch_may_have_another_length(two_cards, found):
    longer = compare(two_cards, num_images=8000, others=())
    assert longer.epoch_s(longer.entries[0]) == pytest.approx(10 * found.epoch_s(found.entries[0]))
    assert all(entry.measured for entry in longer.entries)


def test_a_browser_shows_it(found, tmp_path):
    with opened(write_page(comparison_page(found), tmp_path / "page.html"), 390, dark=True) as view:
        assert view.complaints == [] and view.overflow_px() == 0 and view.smallest_text_px() > 8.5
        assert len(view.figures()) == 3 and all(box["width"] > 250 and box["inked"] > 10 for box in view.figures())


def test_two_computers_with_the_same_card_keep_apart(two_cards, tmp_path):
    again = bench_of("Tesla T4", 0.5, tmp_path / "c.json")
    assert compare([two_cards[1], again], others=()).devices == ["Tesla T4", "Tesla T4 (2)"]


@pytest.mark.parametrize(
    "change, field",
    [
        ({"num_classes": 11}, "num_classes"),
        ({"data": "photos/"}, "--data was synthetic and photos/"),
        ({"recipe": RECIPE.model_copy(update={"amp": "bf16"})}, "amp"),
    ],
)
def test_benches_of_different_work_are_refused(change, field, two_cards, tmp_path):
    other = bench_of("H100", 0.5, tmp_path / "c.json", **change)
    with pytest.raises(LowmemError, match=f"not of the same work: {field}"):
        compare([two_cards[0], other], others=())


def test_a_bench_without_a_measurement_is_refused(tmp_path):
    with pytest.raises(LowmemError, match="nothing to compare"):
        compare([bench_of("H100", 0.5, tmp_path / "c.json", rows=())], others=())


def test_what_a_calibration_says():
    assert calibrate({}).factor == 1 and "as it is" in calibrate({}).in_words()
    alone = calibrate({"a": [1.0, 4.0]})
    assert (
        alone.factor == pytest.approx(2)
        and alone.error_frac == pytest.approx(1)
        and "unknown for other" in alone.in_words()
    )
    both = calibrate({"a": [2.0], "b": [2.0], "c": [2.0]})
    assert (
        both.factor == pytest.approx(2)
        and both.error_frac == pytest.approx(0)
        and geometric_mean([1, 9]) == pytest.approx(3)
    )
