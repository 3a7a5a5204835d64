"""What a user types, from a data folder to predictions; all but bad input in subprocesses."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from lowmem import cli

TINY = ["--set", "model.name=test_resnet", "--set", "model.weights=none", "--set", "data.train_px=64", "--set", "data.val_px=64",
        "--set", "data.test_px=96", "--set", "batch.size=8", "--set", "schedule.epochs=2"]  # fmt: skip


def lowmem(*arguments, cwd=None):
    """Run the command line; returns the finished process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-c", "from lowmem.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, label in enumerate(("1", "2", "10")):
        (root / label).mkdir()
        for index in range(14):
            pixels = np.clip(random.normal(60 + 60 * number, 30, (70, 90, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    done = lowmem("train", "--vram", "1G", "--device", "cpu", "--data", photos, "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_folder_holds_what_is_promised(run):
    names = {path.name for path in run.iterdir()}
    assert {
        "recipe.toml", "plan.json", "machine.json", "data.json", "epochs.csv", "events.jsonl", "checkpoints", "figures", "classifier",
        "evaluation.json", "report.html",
    } <= names and "run.lock" not in names  # fmt: skip
    assert {
        f"{name}{suffix}"
        for name in ("loss", "validation", "learning_rate", "confusion", "seconds", "memory")
        for suffix in (".png", ".svg")
    } == {path.name for path in (run / "figures").iterdir()}
    assert len(list(csv.DictReader(open(run / "epochs.csv")))) == 2
    events = [json.loads(line)["event"] for line in open(run / "events.jsonl")]
    assert events[0] == "started" and events.count("epoch") == 2 and events[-1] == "finished"


def test_plain_timm_opens_the_classifier_with_the_same_logits(run):
    config = json.loads((run / "classifier" / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == ["1", "2", "10"]
    assert config["pretrained_cfg"]["test_input_size"] == [3, 96, 96]
    opened = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    rebuilt = timm.create_model("test_resnet", num_classes=3).eval()
    rebuilt.load_state_dict(safetensors.torch.load_file(run / "classifier" / "model.safetensors"))
    images_BCHW = torch.randn(2, 3, 96, 96)
    assert torch.equal(opened(images_BCHW), rebuilt(images_BCHW))
    assert not torch.equal(opened(images_BCHW), timm.create_model("test_resnet", num_classes=3).eval()(images_BCHW))


def test_predictions_are_timms_own(run, photos, tmp_path):
    done = lowmem("predict", run, photos, "--out", tmp_path / "p.csv", "--top", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "p.csv")))
    assert list(rows[0]) == ["image_name", "pred_label", "probability", "pred_label_2", "probability_2"]
    assert [row["image_name"] for row in rows[:3]] == ["1/0.png", "1/1.png", "1/2.png"] and len(rows) == 42
    assert all(float(row["probability"]) >= float(row["probability_2"]) > 0 for row in rows)
    model = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    facts = model.pretrained_cfg
    image = Image.open(photos / "2" / "3.png").resize((96, 96), Image.Resampling.BILINEAR, box=(10, 0, 80, 70))
    pixels_CHW = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - torch.tensor(facts["mean"])[:, None, None]
    ) / torch.tensor(facts["std"])[:, None, None]
    with torch.inference_mode():
        expected_K = model(pixels_CHW[None]).softmax(1)[0]
    row = next(row for row in rows if row["image_name"] == "2/3.png")
    assert row["pred_label"] == facts["label_names"][int(expected_K.argmax())]
    assert abs(float(row["probability"]) - float(expected_K.max())) < 1e-4


def test_two_runs_average_and_unreadable_images_are_not_missing(run, photos, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.open(photos / "1" / "0.png").save(folder / "good.png")
    (folder / "bad.jpg").write_text("<html>")
    done = lowmem("predict", run, run, folder, "--out", tmp_path / "p.csv", "--device", "cpu", "--flip")
    assert done.returncode == 0 and "bad.jpg" in done.stdout
    rows = list(csv.DictReader(open(tmp_path / "p.csv")))
    assert [(row["image_name"], bool(row["pred_label"])) for row in rows] == [("good.png", True), ("bad.jpg", False)]


def test_evaluate_prints_every_metric(run, photos):
    done = lowmem("evaluate", run, photos, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("accuracy", "precision", "recall", "F1", "loss", "42 images at 96 px"))


def test_a_run_that_was_stopped_early_resumes_to_the_same_classifier(run, photos, tmp_path):
    """Three epochs in one go against two and one more."""
    whole = tmp_path / "whole"
    assert (
        lowmem(
            "train",
            "--vram",
            "1G",
            "--device",
            "cpu",
            "--data",
            photos,
            "--out",
            whole,
            *TINY,
            "--set",
            "schedule.epochs=3",
        ).returncode
        == 0
    )
    done = lowmem("resume", run, "--set", "schedule.epochs=3")
    assert done.returncode == 0, done.stderr
    a, b = (
        safetensors.torch.load_file(sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors")
        for folder in (whole, run)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--vram", "lots"], "is not a size"),
        (["train", "--data", "/nothing/here"], "no such folder"),
        (["train", "--recipe", "quikstart"], "Did you mean quickstart"),
        (["train", "--set", "optimizer.Ir=1"], "optimizer.lr"),
        (["train", "--device", "cuda:7"], "--device cuda:7"),
        (["train", "--checkpoint-every", "soon"], "10m"),
        (["train", "--weights", "/nothing.pth", "--set", "model.weights_optional=false"], "no weights file"),
        (["plan", "--vram", "20M", "--allow", "bitwise"], "the leanest plan needs"),
        (["plan", "--device", "RTX 9999"], "RTX 4060 laptop"),
        (["predict", "/nothing", "/nothing"], "no images"),
        (["evaluate", "/nothing", "/nothing"], "no classifier"),
        (["resume", "/nothing"], "not a run folder"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lowmem", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told, told
    assert expected in " ".join(told.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_process_ends_with_the_code_and_without_a_traceback(tmp_path):
    done = lowmem("train", "--vram", "lots", cwd=tmp_path)
    assert done.returncode == 2 and "is not a size" in done.stderr and "Traceback" not in done.stderr


def test_an_output_folder_in_use_is_refused(run, photos):
    done = lowmem("train", "--vram", "1G", "--device", "cpu", "--data", photos, "--out", run, *TINY)
    assert done.returncode == 2 and "lowmem resume" in done.stderr


def test_a_budget_that_binds_recomputes_and_verify_agrees():
    arguments = [
        "--device",
        "cpu",
        "--set",
        "model.name=test_resnet",
        "--set",
        "model.weights=none",
        "--set",
        "model.freeze_batchnorm=false",
    ]
    done = lowmem("verify", "--vram", "120M", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds" in done.stdout and "0 of" in done.stdout and "made again in the backward pass" in done.stdout
