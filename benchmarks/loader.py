"""How fast images reach the training, against timm, torchvision and DALI: one core each, interleaved, then loaders with workers on all cores.

    python benchmarks/loader.py --simd PYTHON_WITH_PILLOW_SIMD --dali PYTHON_WITH_DALI --out benchmarks/results/loader.json

Like is compared with like: "equal work" is decode, random crop, flip; "recipe" is the experiment's augmentation, where timm's closest
(blur, colour jitter with true hue, grey; it does not sharpen) does a little less. torchvision runs the recipe's literal order. Their
blur is a convolution of 23 and 17 px on torch's tensors, which takes most of their time, so both also run with Pillow's blur in its
place: only against that are ratios claimed. Rates are images per second of CPU time of a process pinned to one core, medians over rounds;
every contender runs in each round, and a ratio is the median of the rounds' ratios. Loaders are timed by the clock, from the first
order to the last batch; memory is what the workers and the loader add, as PSS where the system has it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PX, BATCH = 224, 32
SIZES = {"small": (500, 375), "large": (2000, 1500)}
NUM_PHOTOS = {"small": 32, "large": 16}
PER_ROUND = {"small": 24, "large": 4}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--simd", help="an interpreter with pillow-simd, numpy and lowmem's worker modules")
    options.add_argument("--dali", help="an interpreter with nvidia-dali")
    options.add_argument("--no-loaders", action="store_true", help="one core only")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = measured(Path(scratch), chosen)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["one_core"], indent=1), json.dumps(report["loaders"], indent=1))


def measured(scratch: Path, chosen: argparse.Namespace) -> dict[str, object]:
    from lowmem.machine import this_machine

    for size in SIZES:
        make_photos(scratch / size, size)
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": this_machine().model_dump(),
        "px": PX,
        "rounds": chosen.rounds,
        "photographs": {name: {"px": SIZES[name], "quality": 90, "n": NUM_PHOTOS[name]} for name in SIZES},
        "one_core": {size: one_core(scratch / size, size, chosen) for size in SIZES},
        "loaders": {} if chosen.no_loaders else loaders(scratch / "small", chosen.rounds),
    }


def make_photos(folder: Path, size: str) -> None:
    """Real photographs of scikit-learn and scikit-image: parts of them, and for the large ones mosaics of enlarged parts."""
    import numpy as np
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    photos = [Image.fromarray(array) for array in arrays]
    width, height = SIZES[size]
    random = np.random.default_rng(0)
    for number in range(NUM_PHOTOS[size]):
        photo = photos[number % len(photos)]
        w = int(photo.width * random.uniform(0.7, 1))
        h = min(photo.height, int(w * height / width))
        x, y = (int(random.integers(0, total - part + 1)) for total, part in ((photo.width, w), (photo.height, h)))
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)


# One core: each contender is a process of its own that answers "images seconds" for each number of images it is asked for.


def one_core(folder: Path, size: str, chosen: argparse.Namespace) -> dict[str, object]:
    table = {
        "equal work": {
            "lowmem": "plain",
            "timm": "timm_plain",
            "torchvision": "torchvision_plain",
            "lowmem, pillow-simd": "plain",
            "DALI on the CPU": "dali_plain",
        },
        "recipe": {
            "lowmem": "recipe",
            "timm's closest (no sharpening)": "timm_recipe",
            "timm's closest, Pillow's blur": "timm_recipe_pillow",
            "torchvision, literal order": "torchvision_recipe",
            "torchvision, literal order, Pillow's blur": "torchvision_recipe_pillow",
            "lowmem, pillow-simd": "recipe",
        },
    }
    found: dict[str, object] = {}
    for kind, contenders in table.items():
        rates = race(contenders, folder, size, chosen)
        found[kind] = {
            name: {
                "images_per_cpu_s": round(statistics.median(values), 1),
                "spread": [round(min(values), 1), round(max(values), 1)],
                "lowmem_is_faster_by": round(statistics.median(a / b for a, b in zip(rates["lowmem"], values)), 2),
            }
            if values
            else "not installed, or it failed to start"
            for name, values in rates.items()
        }
    return found


def race(contenders: dict[str, str], folder: Path, size: str, chosen: argparse.Namespace) -> dict[str, list[float]]:
    interpreters = {"lowmem, pillow-simd": chosen.simd, "DALI on the CPU": chosen.dali}
    servers = {}
    for name, pipeline in contenders.items():
        python = interpreters.get(name, sys.executable)
        servers[name] = start(python, pipeline, folder) if python else None
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(chosen.rounds + 1):
        for name, server in servers.items():
            rate = ask(server, PER_ROUND[size]) if server else None
            if rate is not None and number:  # the first round warms up
                rates[name].append(rate)
    for server in servers.values():
        if server:
            server.stdin.close()
            server.wait()
    return rates


def start(python: str, pipeline: str, folder: Path) -> "subprocess.Popen[str]":
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [python, __file__, "--serve", pipeline, "--folder", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(server: "subprocess.Popen[str]", num_images: int) -> float | None:
    try:
        server.stdin.write(f"{num_images}\n")
        server.stdin.flush()
        return float(server.stdout.readline())
    except (OSError, ValueError):
        return None


def serve(pipeline: str, folder: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    paths = sorted(folder.rglob("*.jpg"))
    make, number = PIPELINES[pipeline](paths), 0
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            make(number)
            number += 1
        print(int(line) / (time.process_time() - began), flush=True)


def lowmem_pipeline(recipe: bool) -> Callable[[list[Path]], Callable[[int], object]]:
    def made(paths: list[Path]) -> Callable[[int], object]:
        from types import SimpleNamespace

        from lowmem.data.augment import Draws, augmented

        strengths = RECIPE if recipe else PLAIN
        return lambda number: augmented(
            paths[number % len(paths)], SimpleNamespace(**strengths), PX, Draws(0, 1, number)
        )

    return made


PLAIN = dict(
    blur_prob=0.0, blur_sigma=(0.1, 2.0), crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), sharpen_prob=0.0,
    sharpen_factor=2.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grey_prob=0.0, flip_prob=0.5,
)  # fmt: skip
RECIPE = PLAIN | dict(
    blur_prob=1.0, sharpen_prob=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, grey_prob=0.1
)


def pillow_blur(picture: object) -> object:
    """What GaussianBlur of torchvision does, sigma uniform in 0.1 to 2, by Pillow."""
    import random

    from PIL import ImageFilter

    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def timm_pipeline(recipe: bool, pillow: bool = False) -> Callable[[list[Path]], Callable[[int], object]]:
    def made(paths: list[Path]) -> Callable[[int], object]:
        import torch
        from PIL import Image
        from timm.data import create_transform

        torch.set_num_threads(1)
        colour = dict(
            color_jitter=(0.2, 0.2, 0.2, 0.05), color_jitter_prob=1.0, grayscale_prob=0.1, gaussian_blur_prob=1.0
        )
        options = colour if recipe else dict(color_jitter=None)
        transform = create_transform(PX, is_training=True, use_prefetcher=True, interpolation="bilinear", **options)
        if pillow:
            blur = next(each for each in transform.transforms if "GaussianBlur" in repr(each))
            transform.transforms[transform.transforms.index(blur)] = pillow_blur
        return lambda number: transform(Image.open(paths[number % len(paths)]).convert("RGB"))

    return made


def torchvision_pipeline(recipe: bool, pillow: bool = False) -> Callable[[list[Path]], Callable[[int], object]]:
    def made(paths: list[Path]) -> Callable[[int], object]:
        import numpy as np
        import torch
        import torchvision.transforms as T
        from torchvision.datasets.folder import default_loader

        torch.set_num_threads(1)
        crop = [T.RandomResizedCrop(PX), T.RandomHorizontalFlip()]
        literal = [
            pillow_blur if pillow else T.GaussianBlur(17, (0.1, 2.0)),
            T.RandomResizedCrop(PX),
            T.RandomAdjustSharpness(2.0, 0.5),
            T.ColorJitter(0.2, 0.2, 0.2, 0.05),
            T.RandomGrayscale(0.1),
            T.RandomHorizontalFlip(),
        ]
        transform = T.Compose(literal if recipe else crop)
        return lambda number: np.asarray(transform(default_loader(str(paths[number % len(paths)]))))

    return made


def dali_pipeline(paths: list[Path]) -> Callable[[int], object]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def plain():
        files, _ = fn.readers.file(files=[str(path) for path in paths], random_shuffle=False)
        images = fn.decoders.image_random_crop(files, random_area=(0.08, 1.0), random_aspect_ratio=(3 / 4, 4 / 3))
        return fn.flip(fn.resize(images, size=(PX, PX)), horizontal=fn.random.coin_flip())

    pipe = plain()
    pipe.build()
    return lambda number: pipe.run()


PIPELINES = {
    "plain": lowmem_pipeline(False),
    "recipe": lowmem_pipeline(True),
    "timm_plain": timm_pipeline(False),
    "timm_recipe": timm_pipeline(True),
    "timm_recipe_pillow": timm_pipeline(True, pillow=True),
    "torchvision_plain": torchvision_pipeline(False),
    "torchvision_recipe": torchvision_pipeline(True),
    "torchvision_recipe_pillow": torchvision_pipeline(True, pillow=True),
    "dali_plain": dali_pipeline,
}


# Loaders, whole, on all cores: each measurement is a process of its own.

LOWMEM_LOADER = """
import sys, time
from pathlib import Path
import torch; torch.set_num_threads(1)
from lowmem.data.folder import labelled_images
from lowmem.data.loader import Loader
from lowmem.data.pixels import TrainPixels
from lowmem.planning.plan import LoaderPlan
from lowmem.recipe import load_recipe
split = labelled_images(Path(sys.argv[1]), ("0", "1"))
kind = sys.argv[2]
def open_batches():
    plan = LoaderPlan(kind=kind, workers=2)
    loader = Loader(split, TrainPixels(split, load_recipe("seresnextaa101d_32x8d").augment, 224, 0), 224, 32, plan, 0)
    return (batch for epoch in range(1, 1000) for batch in loader.batches(epoch))
"""
TIMM_LOADER = """
import sys, time
import torch; torch.set_num_threads(1)
from timm.data import ImageDataset, create_loader
def open_batches():
    import multiprocessing
    multiprocessing.set_start_method(sys.argv[2])
    loader = create_loader(ImageDataset(sys.argv[1]), (3, 224, 224), 32, is_training=True, use_prefetcher=False, num_workers=2,
        color_jitter=(0.2, 0.2, 0.2, 0.05), color_jitter_prob=1.0, grayscale_prob=0.1, gaussian_blur_prob=1.0, interpolation="bilinear",
        persistent_workers=True, pin_memory=False, device=torch.device("cpu"))
    return (batch for epoch in range(1000) for batch in loader)
"""
RUN = """
import json, os, psutil
def pss():
    own = psutil.Process()
    return [getattr(p.memory_full_info(), "pss", p.memory_info().rss) for p in (own, *own.children(recursive=True))]
if __name__ == "__main__":
    before = sum(pss())
    began = time.perf_counter(); batches = open_batches(); next(batches); first = time.perf_counter() - began
    for _ in range(3): next(batches)
    began = time.perf_counter()
    for _ in range(10): next(batches)
    seconds = time.perf_counter() - began
    sizes = pss()
    print(json.dumps([first, 320 / seconds, sum(sizes) - before, sum(sizes[1:]) / max(1, len(sizes) - 1)]), flush=True)
    os._exit(0)
"""
LOADERS = {
    "lowmem, 2 threads": (LOWMEM_LOADER, "threads"),
    "lowmem, 2 processes": (LOWMEM_LOADER, "processes"),
    "timm create_loader, 2 spawned workers": (TIMM_LOADER, "spawn"),
    "timm create_loader, 2 forked workers": (TIMM_LOADER, "fork"),
}


def loaders(folder: Path, rounds: int) -> dict[str, object]:
    found: dict[str, list[list[float]]] = {name: [] for name in LOADERS}
    for _ in range(max(2, rounds // 2)):
        for name, (code, kind) in LOADERS.items():
            found[name].append(loader_figures(code, kind, folder))
    names = ("first_batch_s", "images_per_s", "added_bytes", "bytes_per_worker")
    return {
        name: {
            "n": len(rows),
            **{key: float(f"{statistics.median(column):.4g}") for key, column in zip(names, zip(*rows))},
        }
        for name, rows in found.items()
    }


def loader_figures(code: str, kind: str, folder: Path) -> list[float]:
    script = folder.parent / "loader_script.py"
    script.write_text(code + RUN, encoding="utf-8")
    # 14 batches of 32 need 448 images: the folder is listed many times by links.
    many = folder.parent / "many"
    if not many.exists():
        for label in ("0", "1"):
            (many / label).mkdir(parents=True)
            sources = sorted((folder / label).glob("*.jpg"))
            for number in range(256):
                os.link(sources[number % len(sources)], many / label / f"{number}.jpg")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, str(script), str(many), kind],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
