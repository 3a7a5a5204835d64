"""A small data set and short runs of the real engine."""

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.training import keeping
from lowmem.training.start import TrainRequest, train_new_run

TINY = (
    "model.name=test_resnet",
    "model.weights=none",
    "data.train_px=64",
    "data.val_px=64",
    "data.test_px=64",
    "batch.size=8",
    "schedule.epochs=2",
    "amp=fp32",
    "augment.brightness=0.2",
    "augment.hue=0.05",
    "mixup.prob=0.5",
    "model.dropout=0.2",
    "loss.class_weights=reciprocal",
)
INLINE = LoaderPlan(kind="inline", workers=0)
THREADS = LoaderPlan(kind="threads", workers=2)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three classes of noise of different colour, 12, 8 and 20 images."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, (count, colour) in {"1": (12, 60), "2": (8, 120), "10": (20, 180)}.items():
        (root / label).mkdir()
        for index in range(count):
            pixels = np.clip(random.normal(colour, 50, (80, 90, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.jpg")
    return root


@pytest.fixture
def train_run(photos, tmp_path, monkeypatch):
    """Call: train `TINY` under a plan; returns the run folder, without pictures, which take longer than the training."""
    monkeypatch.setattr(keeping, "draw_figures", lambda run: None)
    monkeypatch.setattr(keeping, "write_report", lambda folder: None)

    def run(name, *overrides, **changes):
        fields = {
            "device": "cpu",
            "device_name": "CPU",
            "amp_dtype": "fp32",
            "micro_batch": 8,
            "eval_batch": 8,
            "loader": INLINE,
        } | changes
        plan = tmp_path / f"{name}.json"
        Plan(**fields).save(plan)
        out = tmp_path / name
        assert (
            train_new_run(
                TrainRequest(
                    recipe="quickstart",
                    data=photos,
                    device="cpu",
                    out=out,
                    overrides=(*TINY, *overrides),
                    plan_file=plan,
                )
            )
            == 0
        )
        return out

    return run


def classifier(run):
    return safetensors.torch.load_file(run / "classifier" / "model.safetensors")


def last_state(run):
    """Weights, statistics and optimiser state at the end of a run."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return safetensors.torch.load_file(newest / "model.safetensors") | safetensors.torch.load_file(
        newest / "optimizer.safetensors"
    )
