import re
from html.parser import HTMLParser

import pytest

from lowmem.errors import LowmemError
from lowmem.planning.plan import Budget, MemoryBreakdown, Plan, Prediction
from lowmem.reporting import report_of
from lowmem.results.history import append_epoch
from lowmem.results.page import Page, Section, Table, Text, write_page
from lowmem.results.report import write_report
from lowmem.sizes import GIB
from lowmem.training.evaluate import write_evaluation
from tests.browser import opened
from tests.results.test_plots import evaluation, history

LOADS = re.compile(r"""(src|href)\s*=\s*["']?+(?!\#|data:)|@import|url\((?!\#)|<script""", re.IGNORECASE)
"""What makes a browser fetch something, or run something."""


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run <1>"
    folder.mkdir()
    for row in history(8):
        append_epoch(folder / "epochs.csv", row)
    write_evaluation(folder / "evaluation.json", evaluation(10))
    prediction = Prediction(
        peak=MemoryBreakdown(weights=GIB), step_s=0.4, epoch_s=300, baseline_step_s=0.4, time_source="roofline"
    )
    Plan(
        device="cpu",
        device_name="CPU",
        amp_dtype="fp32",
        micro_batch=8,
        budget=Budget(total_bytes=8 * GIB),
        prediction=prediction,
    ).save(folder / "plan.json")
    (folder / "recipe.toml").write_text('[model]\nname = "a<b"\n', encoding="utf-8")
    return folder


def test_the_page_is_whole_and_needs_no_network(run_folder):
    page = report_of(run_folder).read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and "accuracy" in page and "a&lt;b" in page and "run &lt;1&gt;" in page
    assert not LOADS.search(page)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)) > 10
    references = re.findall(r"""(?:href="|url\()#([^")]+)""", page)
    assert references and set(references) <= set(identifiers)
    HTMLParser().feed(page)


@pytest.mark.parametrize(
    "text", ['<img src="https://x.example/a.png">', "<script>1</script>", "a{background:url(x.png)}"]
)
def test_what_fetches_is_seen(text):
    """The negative control."""
    assert LOADS.search(text)


def test_a_run_without_an_epoch_has_a_report_too(tmp_path):
    assert "No epoch is finished" in write_report(tmp_path).read_text(encoding="utf-8")


def test_what_is_no_result_is_refused_with_what_is(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LowmemError, match="Give .*run folder"):
            report_of(path)


def test_text_cannot_become_markup(tmp_path):
    hostile = "<script>alert(1)</script>"
    page = Page(hostile, hostile, (Section(hostile, Text(hostile), Table((hostile,), ((hostile,),), note=hostile)),))
    text = write_page(page, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") == 8


@pytest.mark.parametrize("width_px", [1280, 390])
def test_a_browser_shows_every_figure_without_complaint(run_folder, width_px):
    with opened(write_report(run_folder), width_px) as view:
        assert view.complaints == [] and view.requests == []
        figures = view.figures()
        assert len(figures) == 6 and all(box["width"] > 250 and box["height"] > 150 for box in figures)
        assert all(box["left"] >= 0 and box["right"] <= width_px and box["inked"] > 20 for box in figures)
        assert view.overflow_px() == 0
        assert view.smallest_text_px() > 8.5


def test_dark_readers_get_dark_paper_and_light_ink(run_folder):
    page = write_report(run_folder)
    with opened(page) as view:
        light = view.colours()
    with opened(page, dark=True) as view:
        dark = view.colours()
    assert light[0] == "rgb(255, 255, 255)" and dark[0] == "rgb(20, 23, 26)"
    assert set(light) & set(dark) == {"none"} and "rgb(0, 0, 0)" not in light


def test_the_browser_notices_what_is_wrong(tmp_path):
    """The negative control: an error on the console, a request, a page too wide for its screen."""
    path = tmp_path / "bad.html"
    path.write_text('<div style="width:900px">x</div><script>null.x</script><img src="missing.png">', encoding="utf-8")
    with opened(path, 390) as view:
        assert view.complaints and view.requests and view.overflow_px() > 400 and view.figures() == []
