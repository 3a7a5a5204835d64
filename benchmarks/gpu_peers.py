"""What benchmarks/gpu.py puts beside lowmem's steps: timm's own way of training, and a whole run on photographs."""

import csv
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageFilter
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler

from lowmem.recipe import Recipe
from lowmem.training.start import TrainRequest, train_new_run

PHOTO_SIZE = (500, 375)


def timm_rows(recipe: Recipe, device: torch.device, num_classes: int, num_steps: int) -> list[dict[str, Any]]:
    """Memory and time of a step as timm's training script does it with `--amp --channels-last`, without and with
    `--grad-checkpointing`, on a batch that is on the device already."""
    return [_timm_row(recipe, device, num_classes, num_steps, checkpointing) for checkpointing in (False, True)]


def _timm_row(
    recipe: Recipe, device: torch.device, num_classes: int, num_steps: int, checkpointing: bool
) -> dict[str, Any]:
    row = {"model": recipe.model.name, "px": recipe.data.train_px, "grad_checkpointing": checkpointing}
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = timm.create_model(recipe.model.name, num_classes=num_classes).to(device, memory_format=torch.channels_last)
    try:
        model.set_grad_checkpointing(checkpointing)
    except AssertionError:
        return row | {"error": "timm does not offer grad checkpointing for this model"}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.optimizer.lr, weight_decay=1e-3)
    scaler = NativeScaler() if on_card and recipe.amp == "fp16" else None
    size, px = recipe.batch.size, recipe.data.train_px
    images_BCHW = torch.randn(size, 3, px, px, device=device).contiguous(memory_format=torch.channels_last)
    labels_B = torch.randint(num_classes, (size,), device=device)

    def step() -> None:
        with torch.autocast(
            device.type, dtype=torch.float16 if scaler else torch.bfloat16, enabled=recipe.amp != "fp32"
        ):
            loss = torch.nn.functional.cross_entropy(model(images_BCHW), labels_B)
        if scaler is not None:
            scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    model.train()
    torch.backends.cudnn.benchmark = True
    for _ in range(2):
        step()
    seconds = _per_step(step, num_steps, on_card)
    if on_card:
        row |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return row | {"step_s": seconds}


def _per_step(step: Any, num_steps: int, on_card: bool) -> float:
    if on_card:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    if on_card:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_steps


def photo_run(
    scratch: Path, device: torch.device, overrides: tuple[str, ...], vram: str, num_images: int
) -> dict[str, Any]:
    """A run of `lowmem train` on photographs of 500 x 375 pixels: how long the steps wait for images, and what it reached."""
    photos = make_photos(scratch / "photos", num_images)
    request = TrainRequest(
        recipe="seresnextaa101d_32x8d",
        data=photos,
        vram=vram,
        device=str(device),
        out=scratch / "run",
        overrides=overrides,
    )
    if train_new_run(request) != 0:
        return {"error": "the run was stopped"}
    with open(scratch / "run" / "epochs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]  # the first epoch warms up
    train_s, wait_s = float(last["train_s"]), float(last["wait_data_s"])
    return {
        "num_images": num_images,
        "epochs": len(rows),
        "cores": os.cpu_count(),
        "images_per_s": float(last["images_per_s"]),
        "train_s": train_s,
        "wait_data_s": wait_s,
        "stall_frac": wait_s / train_s,
        "peak_bytes": int(last["peak_bytes"]),
    }


def make_photos(root: Path, num_images: int, num_classes: int = 4) -> Path:
    """JPEG files with the frequencies of photographs: noise of many sizes, one colour a class."""
    random = np.random.default_rng(0)
    for index in range(num_images):
        label = index % num_classes
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
        grain = Image.fromarray(random.integers(0, 255, (PHOTO_SIZE[1], PHOTO_SIZE[0], 3), dtype=np.uint8))
        image = Image.blend(image, grain.filter(ImageFilter.GaussianBlur(1)), 0.2)
        Image.blend(image, Image.new("RGB", PHOTO_SIZE, (60 * label, 90, 120)), 0.3).save(
            folder / f"{index}.jpg", quality=90
        )
    return root
