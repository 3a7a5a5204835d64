"""Several test sizes, mirror images, averages of runs, zipped submissions, and exports: from one small classifier."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from lowmem import export as exporting
from lowmem.assessment import EvaluateRequest, best_of, evaluate_folder, parse_sizes
from lowmem.data.folder import labelled_images
from lowmem.errors import LowmemError
from lowmem.export import export_onnx
from lowmem.inference import Mirrored, PredictRequest, evaluated, open_classifier, predict_to_csv, probabilities
from lowmem.recipe import ModelRecipe, Recipe
from lowmem.results.classifier import classifier_info, load_classifier, save_classifier
from lowmem.training.model import build_model

CLASSES = ("1", "2", "10")


def make_classifier(folder: Path, name: str = "test_resnet", classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """With statistics of its own, so that its answers depend on the image and its size."""
    torch.manual_seed(seed)
    recipe = Recipe.model_validate(
        {"model": {"name": name, "weights": "none"}, "data": {"train_px": 64, "test_px": 64, "max_side": 128}}
    )
    model = build_model(ModelRecipe(name=name, weights="none"), len(classes)).train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, 3, 160, 160))
        model.get_classifier().weight.normal_(0, 0.3)
    save_classifier(folder, model.eval(), classifier_info(recipe, model, classes))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("a") / "classifier")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, colour in zip(CLASSES, (60, 120, 180)):
        (root / label).mkdir()
        for index in range(5):
            pixels = np.clip(random.normal(colour, 60, (70, 90, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")
    return root


def quiet() -> Console:
    return Console(record=True, width=120)


def test_several_sizes_in_one_go_and_the_best_is_kept(classifier: Path, photos: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(classifier, tmp_path / "classifier"))
    console = quiet()
    found = evaluate_folder(EvaluateRequest(own, photos, "1G", "cpu", "64,48,96", choose=True), console)
    assert [item.px for item in found] == [64, 48, 96] and len({item.loss for item in found}) == 3
    best = best_of(found)
    assert all((-best.accuracy, best.loss) <= (-item.accuracy, item.loss) for item in found)
    assert load_classifier(own)[1].test_px == best.px and f"{best.px} px is now the test size" in console.export_text()
    assert timm.create_model(f"local-dir:{own}", pretrained=True).pretrained_cfg["test_input_size"] == (
        3,
        best.px,
        best.px,
    )
    untouched = classifier / "config.json"
    before = untouched.read_bytes()
    evaluate_folder(EvaluateRequest(classifier, photos, "1G", "cpu", "48,64"), quiet())
    assert untouched.read_bytes() == before


@pytest.mark.parametrize("text", ["", "8", "224,", "224;288", "-64", "9999", "abc"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(LowmemError, match="--px"):
        parse_sizes(text)


def test_one_size_leaves_nothing_to_choose(classifier: Path, photos: Path) -> None:
    with pytest.raises(LowmemError, match="--px 224,288,320"):
        evaluate_folder(EvaluateRequest(classifier, photos, "1G", "cpu", "64", choose=True), quiet())


def test_mirror_images_are_averaged_as_probabilities(classifier: Path, photos: Path) -> None:
    opened = open_classifier(classifier, "1G", "cpu")
    images_BCHW = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        plain, mirrored = (opened.model(x).softmax(1) for x in (images_BCHW, images_BCHW.flip(3)))
        both = Mirrored(opened.model)(images_BCHW).softmax(1)
    assert torch.allclose(both, (plain + mirrored) / 2, atol=1e-6) and not torch.allclose(both, plain, atol=1e-3)
    split = labelled_images(photos, CLASSES)
    averaged_NK = probabilities(opened, split, 64, flip=True)
    evaluation = evaluated(opened, split, 64, flip=True)
    labels_N = torch.from_numpy(np.asarray(split.labels)).long()
    assert evaluation.loss == pytest.approx(float(-averaged_NK[range(len(labels_N)), labels_N].log().mean()), rel=1e-5)
    assert evaluation.accuracy == pytest.approx(float((averaged_NK.argmax(1) == labels_N).double().mean()))


def test_runs_are_averaged_and_zipped(classifier: Path, photos: Path, tmp_path: Path) -> None:
    other = make_classifier(tmp_path / "b" / "classifier", seed=1)
    out = tmp_path / "submission.csv"
    predict_to_csv(PredictRequest([classifier, other, photos], out, top=3, vram="1G", device="cpu", zip=True), quiet())
    opened = [open_classifier(path, "1G", "cpu") for path in (classifier, other)]
    split = labelled_images(photos, CLASSES)
    expected_NK = sum(probabilities(item, split, 64) for item in opened) / 2
    first = out.read_text().splitlines()[1].split(",")
    assert first[0] == "1/0.png" and first[1] == CLASSES[int(expected_NK[0].argmax())]
    assert float(first[2]) == pytest.approx(float(expected_NK[0].max()), abs=2e-6)
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["submission.csv"] and archive.read("submission.csv") == out.read_bytes()


@pytest.mark.parametrize(
    ("classes", "told"), [(("10", "2", "1"), "another order.*class 0"), (("1", "2", "3"), "other classes")]
)
def test_classifiers_of_other_classes_are_not_averaged(
    classifier: Path, photos: Path, tmp_path: Path, classes: tuple[str, ...], told: str
) -> None:
    other = make_classifier(tmp_path / "other", classes=classes)
    with pytest.raises(LowmemError, match=f"(?s){told}"):
        predict_to_csv(
            PredictRequest([classifier, other, photos], tmp_path / "p.csv", vram="1G", device="cpu"), quiet()
        )
    assert not (tmp_path / "p.csv").exists()


@pytest.fixture(scope="module")
def exported(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    return export_onnx(classifier, tmp_path_factory.mktemp("exported") / "a.onnx", 96, quiet())


def test_an_export_gives_pytorchs_logits(classifier: Path, exported: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert [file.name for file in exported.parent.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    images_BCHW = torch.randn(7, 3, 96, 96)
    model, info = load_classifier(classifier)
    with torch.inference_mode():
        expected_BK = model(images_BCHW)
    found_BK = torch.from_numpy(session.run(["logits"], {"images": images_BCHW.numpy()})[0])
    assert torch.allclose(found_BK, expected_BK, atol=1e-4) and found_BK.abs().max() > 0.1
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(CLASSES) and json.loads(facts["mean"]) == list(info.mean)
    assert (facts["px"], float(facts["crop_frac"]), facts["max_side"]) == ("96", 1.0, "128")


def test_an_export_that_differs_is_an_error_and_is_not_kept(
    classifier: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(model: torch.nn.Module, info: object, px: int, path: Path) -> None:
        shutil.copy(exported, path)
        with torch.no_grad():
            model.get_classifier().bias[0] += 0.05

    monkeypatch.setattr(exporting, "_write", spoilt)
    with pytest.raises(LowmemError, match="differ from PyTorch's"):
        export_onnx(classifier, tmp_path / "a.onnx", 96, quiet())
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_it_says_what_to_install(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(LowmemError, match=r"no_such_package.*lowmem\[export\]"):
        export_onnx(classifier, None, None, quiet())
