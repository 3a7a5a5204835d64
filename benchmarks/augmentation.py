"""How true lowmem's reordered augmentation is to the literal one: pixels in dB, and accuracy.

    python benchmarks/augmentation.py --out benchmarks/results/augmentation.json
    python benchmarks/augmentation.py --accuracy --seeds 5 --out benchmarks/results/augmentation_accuracy.json

Pixels: real photographs that ship with scikit-learn and scikit-image; the literal operations are torchvision's (benchmarks/literal.py),
with the same draws. Each operation is compared by itself, on what the literal order gives it; "all" is the whole recipe from the file.
"none" is how far one is off by leaving the operation out: a figure near it would mean that nothing is reproduced.

Accuracy: the quickstart recipe's network from ImageNet weights on the embedded images with the experiment's augmentation, trained
once with each order and seed; start, order of images and draws are the same in both.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from literal import LiteralPixels, literal_steps, literally_augmented
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from lowmem.data.augment import Draws, augmented, blurred, crop_box, saturated, sharpened, with_levels
from lowmem.data.colour import hue_shifted
from lowmem.data.decode import resized_crop
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import embedded_images, open_dataset
from lowmem.data.loader import Loader
from lowmem.data.pixels import EvalPixels, Pixels, TrainPixels
from lowmem.machine import this_machine
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.recipe import Recipe, load_recipe
from lowmem.training.engine import Engine
from lowmem.training.evaluate import evaluate
from lowmem.training.model import initialised_model

PX = 224
DRAWS_PER_PHOTO = 40
EPOCHS = 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/augmentation.json"))
    options.add_argument("--accuracy", action="store_true")
    options.add_argument("--seeds", type=int, default=5)
    chosen = options.parse_args()
    report = accuracy(chosen.seeds) if chosen.accuracy else fidelity()
    report["machine"] = this_machine().model_dump()
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name not in ("machine", "runs")}, indent=1))


def photographs() -> dict[str, Image.Image]:
    arrays = dict(zip(("china", "flower"), load_sample_images().images))
    arrays |= {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "retina")}
    arrays["motorcycle"] = data.stereo_motorcycle()[0]
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def fidelity() -> dict[str, object]:
    """PSNR of each operation and of the whole recipe against the literal ones: mean, worst, and that of doing nothing."""
    recipe = load_recipe("seresnextaa101d_32x8d").augment
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, photo) in enumerate(photographs().items()):
            path = Path(scratch) / f"{name}.jpg"
            photo.save(path, quality=90)
            for index in range(DRAWS_PER_PHOTO):
                draws = Draws(number, 1, index)
                for operation, ours, literal, without in compared(path, recipe, draws):
                    found[operation].append((decibels(ours, literal), decibels(without, literal)))
    return {
        "recipe": recipe.model_dump(),
        "px": PX,
        "photographs": {name: photo.size for name, photo in photographs().items()},
        "draws_per_photograph": DRAWS_PER_PHOTO,
        "psnr_db": {
            operation: {
                "n": len(pairs),
                "mean": round(statistics.mean(ours for ours, _ in pairs), 1),
                "worst": round(min(ours for ours, _ in pairs), 1),
                "none_mean": round(statistics.mean(none for _, none in pairs), 1),
            }
            for operation, pairs in found.items()
        },
    }


def compared(path: Path, recipe: object, draws: Draws):
    """(operation, ours, literal, without it) for one photograph and its draws."""
    with Image.open(path) as image:
        photo = image.convert("RGB")
    box = crop_box(*photo.size, recipe, draws)
    scales = PX / (box[2] - box[0]), PX / (box[3] - box[1])
    cropped = photo.resize((PX, PX), Image.Resampling.BILINEAR, box=box)
    before, steps = photo, dict(literal_steps(photo, recipe, PX, draws))
    for operation, literal in steps.items():
        if operation == "crop":
            sigma = recipe.blur_sigma[0] + draws.sigma * (recipe.blur_sigma[1] - recipe.blur_sigma[0])
            yield "blur after the crop", blurred(cropped, sigma, *scales), literal, cropped
            before = literal
            if max(scales) > 0.5:
                continue
            with Image.open(path) as image:
                yield "scaled decode", resized_crop(image, box, PX, PX), cropped, centre(photo)
        elif operation == "sharpen":
            yield operation, sharpened(before, recipe.sharpen_factor), literal, before
        elif operation == "saturation":
            factors = [1 + (2 * getattr(draws, name) - 1) * 0.2 for name in ("brightness", "contrast", "saturation")]
            start = steps.get("sharpen", steps["crop"])
            ours = saturated(with_levels(start, *factors[:2]), factors[2])
            yield "brightness, contrast, saturation", ours, literal, start
        elif operation == "hue":
            yield operation, hue_shifted(before, round((2 * draws.hue - 1) * recipe.hue * 255)), literal, before
        elif operation == "grey":
            yield operation, saturated(before, 0), literal, before
        before = literal
    literal = literally_augmented(path, recipe, PX, draws)
    yield "all", augmented(path, recipe, PX, draws), literal, np.asarray(cropped)


def centre(photo: Image.Image) -> Image.Image:
    """Another crop, for the figure of doing nothing."""
    return photo.resize((PX, PX), Image.Resampling.BILINEAR)


def decibels(a: object, b: object) -> float:
    """Peak signal-to-noise ratio of two pictures of 8 bits; at most 99."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-9))))


def accuracy(num_seeds: int) -> dict[str, object]:
    """Validation accuracy after the last epoch with each order, and the paired differences."""
    augment = load_recipe("seresnextaa101d_32x8d").augment
    recipe = load_recipe("quickstart", (f"schedule.epochs={EPOCHS}",)).model_copy(update={"augment": augment})
    runs = []
    for seed in range(num_seeds):
        for order, pixels in (("literal", LiteralPixels), ("reordered", TrainPixels)):
            run = {"seed": seed, "order": order, **trained(recipe.model_copy(update={"seed": seed}), pixels)}
            runs.append(run)
            print(run, flush=True)
    by_order = {order: [run["accuracy"] for run in runs if run["order"] == order] for order in ("literal", "reordered")}
    differences = [ours - literal for ours, literal in zip(by_order["reordered"], by_order["literal"])]
    return {
        "command": "python benchmarks/augmentation.py --accuracy",
        "recipe": "quickstart, with augment of seresnextaa101d_32x8d",
        "epochs": EPOCHS,
        "n": num_seeds,
        "mean_accuracy": {order: statistics.mean(values) for order, values in by_order.items()},
        "spread": {order: [min(values), max(values)] for order, values in by_order.items()},
        "mean_difference": statistics.mean(differences),
        "standard_error_of_the_difference": statistics.stdev(differences) / len(differences) ** 0.5,
        "runs": runs,
    }


def trained(recipe: Recipe, pixels_of: type[Pixels]) -> dict[str, float]:
    dataset = open_dataset(embedded_images(), recipe.data.val_fraction, recipe.seed)
    plan = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=recipe.batch.size)
    loading = LoaderPlan(kind="threads", workers=2)
    model, _ = initialised_model(recipe.model, len(dataset.classes), recipe.seed)
    config = model.pretrained_cfg
    engine = Engine(model, recipe, plan, torch.from_numpy(dataset.train.counts(len(dataset.classes))))
    device_input = DeviceInput(
        Normalisation(config["mean"], config["std"]), engine.device, plan.memory_format, recipe.mixup, recipe.seed
    )
    px, size = recipe.data.train_px, recipe.batch.size
    train_pixels = pixels_of(dataset.train, recipe.augment, px, recipe.seed)
    with Loader(dataset.train, train_pixels, px, size, loading, recipe.seed) as loader:
        for epoch in range(1, EPOCHS + 1):
            engine.training_mode()
            lr = recipe.optimizer.lr * min(1, epoch / 2) * (0.5 if epoch > EPOCHS * 3 // 4 else 1)
            losses = [
                engine.train_step(batch, device_input, epoch, step, lr)
                for step, batch in enumerate(loader.batches(epoch))
            ]
    with Loader(dataset.val, EvalPixels(dataset.val, px, 1.0), px, size, loading) as loader:
        found = evaluate(engine.model, loader.batches(), device_input, plan, dataset.classes)
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "train_loss": float(torch.stack(losses).mean()),
    }


if __name__ == "__main__":
    main()
