import gc
import subprocess
import sys

import numpy as np
import psutil
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.planning.plan import Plan
from lowmem.results.history import EpochRow, append_epoch, read_history
from lowmem.results.plots import plot_run
from lowmem.sizes import GIB, MIB
from lowmem.training.evaluate import Evaluation, evaluate


def history(num_epochs):
    return [
        EpochRow(
            epoch,
            3 / epoch,
            2 / epoch + 0.2,
            1 - 1 / (epoch + 1),
            0.8,
            0.7,
            0.75,
            1e-3 * 0.8**epoch,
            11.0,
            9.5,
            1.5,
            0.2,
            60.0,
            3 * GIB,
        )
        for epoch in range(1, num_epochs + 1)
    ]


def evaluation(num_classes):
    random = np.random.default_rng(0)
    confusion = random.poisson(0.3, (num_classes, num_classes)) + np.diag(random.poisson(12, num_classes))
    total = confusion.sum()
    accuracy = float(np.trace(confusion) / total)
    return Evaluation(
        classes=tuple(f"class {n}" for n in range(num_classes)),
        num_images=int(total), accuracy=accuracy, top5=1.0, precision=0.8, recall=0.8, f1=0.8, loss=0.5,
        confusion=tuple(map(tuple, confusion.tolist())),
    )  # fmt: skip


def test_every_figure_is_drawn_as_png_and_svg(tmp_path):
    for num_classes, num_epochs in ((2, 1), (100, 60)):
        paths = plot_run(history(num_epochs), evaluation(num_classes), tmp_path, 4 * GIB, 3 * GIB)
        assert len(paths) == 12
        for path in paths:
            if path.suffix == ".png":
                pixels = np.asarray(Image.open(path).convert("L"))
                assert pixels.std() > 10 and min(pixels.shape) > 300
            else:
                assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")


def resident_mib():
    gc.collect()
    return psutil.Process().memory_info().rss / MIB


def growth_mib(work, num_rounds, num_warm=4):
    """How much the process grows over some rounds, after a few that fill the caches."""
    for _ in range(num_warm):
        work()
    before = resident_mib()
    for _ in range(num_rounds):
        work()
    return resident_mib() - before


def figures_left(work, num_rounds):
    """How many figures a piece of work leaves in memory."""
    for _ in range(num_rounds):
        work()
    gc.collect()
    return sum(isinstance(thing, Figure) for thing in gc.get_objects())


def test_drawing_leaves_no_figure_in_memory(tmp_path):
    rows, found = history(3), evaluation(2)
    assert figures_left(lambda: plot_run(rows, found, tmp_path), 3) == 0


@pytest.mark.slow
def test_200_epochs_of_evaluation_and_plotting_leave_memory_flat(tmp_path):
    model, batch = (
        timm.create_model("test_resnet", num_classes=2),
        HostBatch(torch.zeros(8, 64, 64, 3, dtype=torch.uint8), torch.arange(8) % 2, torch.arange(8)),
    )
    plan = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=8)
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), torch.device("cpu"), "channels_last")

    def epoch():
        plot_run(history(3), evaluate(model, [batch] * 3, device_input, plan, ("a", "b")), tmp_path)

    assert growth_mib(epoch, 200, num_warm=60) < 15


def test_figures_that_are_kept_are_seen():
    """The negative control: what a global list of open figures does."""
    kept = []
    assert figures_left(lambda: kept.append(Figure()), 3) == 3


@pytest.mark.slow
def test_memory_that_is_kept_is_seen():
    """The negative control of the 200 epochs: 0.2 MB are kept each time."""
    kept = []
    assert growth_mib(lambda: kept.append(np.ones(25_000)), 200, num_warm=60) > 15


def test_no_global_figure_state_is_imported():
    code = "import sys, lowmem.results.plots, lowmem.budgeting; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_log_survives_a_round_trip_and_an_epoch_trained_again(tmp_path):
    path = tmp_path / "epochs.csv"
    rows = history(3)
    for row in rows:
        append_epoch(path, row)
    assert read_history(path) == rows
    append_epoch(path, rows[1])
    assert read_history(path) == rows[:2]
