import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lowmem.planning.plan import Budget, MemoryBreakdown, Plan, Prediction
from lowmem.results.history import append_epoch
from lowmem.results.plots import plot_run
from lowmem.results.report import write_report
from lowmem.sizes import GIB
from lowmem.training.evaluate import write_evaluation
from tests.results.test_plots import evaluation, history

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run <1>"
    folder.mkdir()
    for row in history(8):
        append_epoch(folder / "epochs.csv", row)
    write_evaluation(folder / "evaluation.json", evaluation(10))
    plot_run(history(8), evaluation(10), folder / "figures", 4 * GIB, 3 * GIB)
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
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and "accuracy" in page and "a&lt;b" in page and "run &lt;1&gt;" in page
    assert not re.search(
        r'(src|href)\s*=\s*"(https?:)?//', re.sub(r'xmlns(:\w+)?="[^"]*"|xlink:href="#[^"]*"', "", page)
    )
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    HTMLParser().feed(page)


def test_a_run_without_an_epoch_has_a_report_too(tmp_path):
    assert "No epoch is finished" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(run_folder, tmp_path, width):
    page = write_report(run_folder)
    picture = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000", f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.stat().st_size > 30_000
    assert "CONSOLE" not in done.stderr
