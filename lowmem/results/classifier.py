"""The classifier that a run gives: a folder in timm's hub format, which plain timm opens.

    timm.create_model("local-dir:RUN/classifier", pretrained=True)

model.safetensors holds weights and statistics in float32; config.json the architecture, class names in order, image sizes,
mean and standard deviation.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import timm
from pydantic import BaseModel, ConfigDict
from timm.models import save_for_hf
from torch import Tensor, nn

from lowmem.disk import REAL_DISK, Disk, replace_file
from lowmem.errors import LowmemError
from lowmem.recipe import Recipe

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_SIDE = "lowmem_max_side"


class ClassifierInfo(BaseModel):
    """What a classifier needs beside its weights."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    classes: tuple[str, ...]
    train_px: int
    test_px: int
    crop_frac: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: dict[str, Any] = {}
    """Arguments of the timm model beside its name."""
    max_side: int = 0
    """Longer side to which images were shrunk before anything else (data/shrunk.py); 0: not at all."""


def classifier_info(recipe: Recipe, model: nn.Module, classes: tuple[str, ...]) -> ClassifierInfo:
    """The facts of a recipe's classifier; mean and std are those that the initial weights were made for."""
    return ClassifierInfo(
        architecture=recipe.model.name,
        classes=classes,
        train_px=recipe.data.train_px,
        test_px=recipe.data.test_px,
        crop_frac=recipe.data.crop_frac,
        mean=tuple(model.pretrained_cfg["mean"]),
        std=tuple(model.pretrained_cfg["std"]),
        options=recipe.model.options,
        max_side=recipe.data.max_side,
    )


def save_classifier(folder: Path, model: nn.Module, info: ClassifierInfo) -> None:
    """Write `folder` whole: it is made aside, flushed and renamed into place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = {
        "num_classes": len(info.classes),
        "label_names": list(info.classes),
        "input_size": [3, info.train_px, info.train_px],
        "test_input_size": [3, info.test_px, info.test_px],
        "mean": list(info.mean),
        "std": list(info.std),
        "crop_pct": info.crop_frac,
        "test_crop_pct": info.crop_frac,
        "interpolation": "bilinear",
    }
    contiguous = model.register_state_dict_post_hook(_make_contiguous)
    try:
        save_for_hf(model, partial, model_config=config, model_args=info.options or None, safe_serialization=True)
    finally:
        contiguous.remove()
    _set_config(partial / CONFIG, config, info.max_side)
    _move_into_place(partial, folder, REAL_DISK)


def put_back_classifier(folder: Path) -> None:
    """After a kill between the two renames of `save_classifier`: the older classifier in its place again."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        REAL_DISK.rename(old, folder)


def _move_into_place(partial: Path, folder: Path, disk: Disk) -> None:
    old = folder.with_name(f".{folder.name}.old")
    for path in sorted(partial.iterdir()):
        disk.sync_file(path)
    disk.sync_folder(partial)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        disk.rename(folder, old)
    disk.rename(partial, folder)
    disk.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_classifier(path: Path) -> tuple[nn.Module, ClassifierInfo]:
    """The classifier of a run folder or of a classifier folder, on the CPU, in evaluation mode; raises LowmemError."""
    folder = classifier_folder(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise LowmemError(
            f"{path}: holds no classifier ({CONFIG} and {WEIGHTS}). Give the folder of a run that finished an epoch, or its classifier/."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        facts = config["pretrained_cfg"]
        info = ClassifierInfo(
            architecture=config["architecture"],
            classes=tuple(facts["label_names"]),
            train_px=facts["input_size"][1],
            test_px=facts.get("test_input_size", facts["input_size"])[1],
            crop_frac=facts.get("crop_pct", 1.0),
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            max_side=config.get(MAX_SIDE, 0),
        )
        model = timm.create_model(f"local-dir:{folder.resolve().as_posix()}", pretrained=True)
    except Exception as error:  # a damaged folder provokes any error in json, safetensors and timm
        raise LowmemError(
            f"{folder}: damaged classifier: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}."
        ) from error
    return model.eval(), info


def set_test_px(path: Path, px: int) -> None:
    """Make `px` the test size of the classifier of a run folder or of a classifier folder."""
    config_path = classifier_folder(path) / CONFIG
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["pretrained_cfg"]["test_input_size"] = [3, px, px]
    try:
        replace_file(config_path, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise LowmemError(f"{config_path}: cannot be written: {error.strerror}.") from None


def classifier_folder(path: Path) -> Path:
    """Of a run or the classifier folder itself."""
    return path / "classifier" if (path / "classifier").is_dir() else path


def _make_contiguous(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """safetensors writes contiguous tensors only; channels_last weights are not."""
    for name, tensor in state.items():
        state[name] = tensor.contiguous()


def _set_config(path: Path, facts: dict[str, object], max_side: int) -> None:
    """timm's writer leaves out some of the facts that its reader takes; `max_side` is ours, and timm passes it over."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["num_classes"] = facts["num_classes"]
    config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | facts
    if max_side:
        config[MAX_SIDE] = max_side
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
