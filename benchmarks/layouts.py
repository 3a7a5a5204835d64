"""What measured memory layouts by region gain: whole training steps under the network's one layout and under the chosen ones, in turn.

    OMP_NUM_THREADS=1 python benchmarks/layouts.py --out benchmarks/results/layouts.json
    python benchmarks/layouts.py --device cuda:0 --batch 32 --px 224 --amp bf16 --out benchmarks/results/layouts-gpu.json

For each model: the gain that the sum of convolutions promises, the gain of whole steps (median of ratios over rounds), the gain of the other
layout for the whole network, and how far the weights are from those of the default after 3 steps (relative norm of their change).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.machine import this_machine
from lowmem.memory.limit import NUM_COUNTED, CountedLimit
from lowmem.planning.convolutions import choose_layouts, convolutions_of
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe, load_recipe
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.verification import verify

NUM_CLASSES = 10
MODELS = ("resnet18", "resnet50", "resnext50_32x4d", "seresnext50_32x4d", "tf_efficientnet_lite0")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/layouts.json"))
    options.add_argument("--device", default="cpu")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--px", type=int, default=128)
    options.add_argument("--amp", default="fp32")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--models", nargs="*", default=MODELS)
    chosen = options.parse_args()
    arguments = {name: str(value) for name, value in vars(chosen).items() if name != "out"}
    report: dict[str, Any] = {"command": "python benchmarks/layouts.py", "arguments": arguments}
    report |= {"machine": this_machine().model_dump(), "torch_threads": torch.get_num_threads(), "rows": []}
    for name in chosen.models:
        report["rows"].append(measured(name, chosen))
        chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        row = report["rows"][-1]
        print({key: value for key, value in row.items() if key not in ("ratios", "layouts")}, flush=True)


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    overrides = (
        f"model.name={name}",
        "model.weights=none",
        f"batch.size={chosen.batch}",
        f"data.train_px={chosen.px}",
        f"amp={chosen.amp}",
    )
    recipe, device = load_recipe("quickstart", overrides), torch.device(chosen.device)
    plan = Plan(
        device=str(device), device_name="", amp_dtype=chosen.amp, micro_batch=chosen.batch, cudnn_benchmark=False
    )
    network = FakeNetwork(recipe, NUM_CLASSES)
    found, _ = convolutions_of(network, plan)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        choice = choose_layouts(network, plan, device, Path(scratch) / "times.json")
    measuring_s = time.perf_counter() - started
    plans = {
        "default": plan,
        "contiguous": plan.model_copy(update={"memory_format": "contiguous"}),
        "regions": plan.model_copy(update={"layouts": choice.layouts, "exactness": "rounding"}),
    }
    seconds = in_turn(recipe, plans, chosen.rounds)
    ratios = {n: [d / s for d, s in zip(seconds["default"], seconds[n])] for n in ("contiguous", "regions")}
    kinds = [kind for convolutions in found.values() for kind in convolutions]
    same = verify(recipe, plans["regions"], NUM_CLASSES, steps=3)
    return {
        "model": name,
        "convolutions": len(kinds),
        "distinct": len(set(kinds)),
        "measuring_s": round(measuring_s, 1),
        "blocks": len(network.blocks),
        "blocks_in_the_other_layout": sum(layout != plan.memory_format for layout in choice.layouts.values()),
        "gain_of_convolutions_pred": round(choice.gain, 4),
        "gain_of_steps": round(median(ratios["regions"]), 4),
        "gain_of_steps_contiguous": round(median(ratios["contiguous"]), 4),
        "step_s_default": round(median(seconds["default"]), 4),
        "weights_relative_to_default": next(k.relative for k in same.kinds if k.kind == "weights"),
        "ratios": ratios,
        "layouts": choice.layouts,
    }


def in_turn(recipe: Recipe, plans: dict[str, Plan], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step under each plan, once a round, after one step to warm up."""
    model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
    engine = Engine(model, recipe, plans["default"], torch.ones(NUM_CLASSES, dtype=torch.int64))
    batches = random_batches(recipe, NUM_CLASSES, 2)
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(rounds):
        for name in list(plans)[:: 1 if number % 2 else -1]:
            engine.adopt(plans[name])
            if isinstance(engine.enforcement, CountedLimit):  # counting takes time and is not what is measured
                engine.enforcement.num_counted["training"] = NUM_COUNTED
            device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, plans[name].memory_format)
            engine.train_step(batches[0], device_input, 1, 0, 1e-4)
            seconds[name].append(_timed(engine, batches, device_input))
    engine.close()
    return seconds


def _timed(engine: Engine, batches: list[Any], device_input: DeviceInput) -> float:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for step in range(2):
        engine.train_step(batches[step], device_input, 1, step, 1e-4)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / 2


if __name__ == "__main__":
    main()
