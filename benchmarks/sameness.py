"""Every policy and optimizer placement against the unconstrained run, over many families of networks: 0 differing tensors.

Each model trains 3 optimizer steps of 4 images through the real Engine, once without any policy and once per variant; weights,
statistics and optimizer state are compared bit by bit. The negative control is a naive checkpoint around the blocks, which
updates batch norm twice and forgets the random generator: where a model has either, the comparison must see it.

    python benchmarks/sameness.py [--device cuda:0] [--only NAME ...] [--out FILE]
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.memory import activations, offload
from lowmem.memory.batchnorm import has_live_batchnorm
from lowmem.memory.dropout import draws_random_numbers
from lowmem.planning.blocks import find_blocks
from lowmem.planning.plan import STEM, BlockPolicy, Plan
from lowmem.recipe import BatchRecipe, DataRecipe, ModelRecipe, OptimizerRecipe, Recipe
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.verification import same_bits

MODELS: dict[str, dict[str, Any]] = {
    "resnet10t": {"drop_path": 0.1},
    "seresnext26d_32x4d": {"dropout": 0.2},
    "test_efficientnet_evos": {},
    "res2net50d": {},
    "test_byobnet": {},
    "test_nfnet": {"drop_path": 0.2},
    "mobilenetv3_small_050": {"dropout": 0.2},
    "mixnet_s": {"drop_path": 0.1},
    "test_efficientnet": {"drop_path": 0.2, "dropout": 0.2},
    "efficientnet_lite0": {"drop_path": 0.2},
    "tinynet_e": {},
    "lcnet_050": {},
    "ghostnet_050": {},
    "regnetx_002": {},
    "regnety_002": {"drop_path": 0.2},
    "densenet121": {},
    "dla46_c": {},
    "repvgg_a0": {},
    "hrnet_w18_small": {},
    "rexnet_100": {"drop_path": 0.2},
    "ese_vovnet19b_dw": {},
    "cs3darknet_focus_s": {"drop_path": 0.2},
    "mobileone_s0": {},
    "starnet_s1": {"drop_path": 0.2},
    "convnext_atto": {"drop_path": 0.2, "dropout": 0.2},
    "edgenext_xx_small": {},
    "test_vit": {"drop_path": 0.2, "dropout": 0.2},
    "xcit_nano_12_p16_224": {},
    "pvt_v2_b0": {"drop_path": 0.2},
    "poolformer_s12": {},
    "mobilevit_xxs": {},
    "efficientvit_b0": {},
    "fastvit_t8": {"drop_path": 0.1},
    "test_mambaout": {"drop_path": 0.2},
}
VARIANTS: dict[str, tuple[str, str]] = {
    "selective": ("selective", "device"),
    "selective, half dropped": ("dropped", "device"),
    "full": ("full", "device"),
    "offload": ("offload", "device"),
    "offload of a part": ("offload_part", "device"),
    "selective + offload": ("selective_offload", "device"),
    "made again": ("again", "device"),
    "made again + offload": ("again_offload", "device"),
    "none, host optimizer": ("none", "host"),
    "selective + offload, host optimizer": ("selective_offload", "host"),
    "full, optimizer in backward": ("full", "backward"),
    "offload, optimizer in backward": ("offload", "backward"),
    "selective, host optimizer in backward": ("selective", "host_backward"),
}
PX, BATCH, STEPS, NUM_CLASSES = 64, 4, 3, 5
State = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sameness.json")
    options = parser.parse_args()
    for name in set(VARIANTS) - set(options.variants):
        del VARIANTS[name]
    offload.MIN_OFFLOAD_BYTES = 1024  # small images: everything travels
    if options.device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    started = time.perf_counter()
    rows = [
        measure(name, amp, options.device)
        for index, name in enumerate(options.only)
        for amp in (("fp32", "bf16")[index % 2],)
    ]
    result = summary(rows, options.device) | {"wall_s": round(time.perf_counter() - started, 1), "models": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "models"}, indent=1))
    sys.exit(0 if result["passed"] else 1)


def summary(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    differing = sum(variant["num_differing"] for row in rows for variant in row["variants"].values())
    due = [row for row in rows if row["negative_control_due"]]
    caught = sum(row["negative_control_differing"] > 0 for row in due)
    return {
        "command": "python " + shlex.join(sys.argv),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(device)
        if device != "cpu"
        else f"cpu, {torch.get_num_threads()} thread(s)",
        "px": PX,
        "batch": BATCH,
        "steps": STEPS,
        "num_models": len(rows),
        "num_runs": sum(len(row["variants"]) for row in rows),
        "entries_compared": sum(variant["num_entries"] for row in rows for variant in row["variants"].values()),
        "entries_differing": differing,
        "negative_controls_due": len(due),
        "negative_controls_caught": caught,
        "passed": differing == 0 and caught == len(due),
    }


def measure(name: str, amp: str, device: str) -> dict[str, Any]:
    """All variants of one model."""
    started = time.perf_counter()
    recipe = Recipe(
        model=ModelRecipe(name=name, weights="none", **MODELS[name]),
        data=DataRecipe(train_px=PX),
        batch=BatchRecipe(size=BATCH),
        optimizer=OptimizerRecipe(lr=1e-3),
        amp=amp,
    )
    plan = Plan(device=device, device_name=device, amp_dtype=amp, micro_batch=BATCH, cudnn_benchmark=False)
    batches = random_batches(recipe, NUM_CLASSES, STEPS)
    reference, _ = trained(recipe, plan, batches)
    facts = block_facts(recipe)
    variants = {}
    for variant, (kind, placement) in VARIANTS.items():
        blocks = policies(facts, kind)
        state, host_bytes = trained(recipe, plan.model_copy(update={"blocks": blocks, "optimizer": placement}), batches)
        variants[variant] = {
            "num_entries": len(state),
            "num_differing": num_differing(reference, state),
            "blocks": len(blocks),
            "offloaded_bytes": host_bytes,
        }
    control = negative_control(recipe, plan, batches, reference)
    model, _ = initialised_model(recipe.model, NUM_CLASSES, 0)
    row = {
        "model": name,
        "amp": amp,
        **MODELS[name],
        "variants": variants,
        "blocks": len(facts),
        "blocks_that_change_their_input": sum(not fact.recomputable for fact in facts.values()),
        "negative_control_differing": control,
        "negative_control_due": any(
            has_live_batchnorm(block.train()) or draws_random_numbers(block)
            for path, block in find_blocks(model).items()
            if facts[path].recomputable
        ),
        "wall_s": round(time.perf_counter() - started, 1),
    }
    wrong = {key: value["num_differing"] for key, value in variants.items() if value["num_differing"]}
    print(
        f"{name:24} {amp} {len(facts):3} blocks, control {control:4}, {row['wall_s']:5} s  {wrong or 'same'}",
        flush=True,
    )
    return row


def trained(
    recipe: Recipe, plan: Plan, batches: list[HostBatch], change: Callable[[nn.Module], None] | None = None
) -> tuple[State, int]:
    """Weights, statistics and optimizer state after the batches, and the host memory that the offload took."""
    model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
    engine = Engine(model, recipe, plan, torch.ones(NUM_CLASSES, dtype=torch.int64))
    if change is not None:
        change(model)
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.25,) * 3), engine.device, plan.memory_format)
    for step, batch in enumerate(batches):
        engine.train_step(batch, device_input, epoch=1, step=step, lr=recipe.optimizer.lr)
    state = engine.model_tensors() | engine.optimizer_tensors()
    host_bytes = engine.policies.store.host_bytes if engine.policies.store else 0
    engine.close()
    return state, host_bytes


def num_differing(a: State, b: State) -> int:
    assert a.keys() == b.keys()
    return sum(not same_bits(a[name], b[name]) for name in a)


def negative_control(recipe: Recipe, plan: Plan, batches: list[HostBatch], reference: State) -> int:
    """Tensors that differ under the naive checkpoint; all of them where it cannot even run (DenseNet's growing lists)."""
    try:
        return num_differing(reference, trained(recipe, plan, batches, naive_checkpoints)[0])
    except RuntimeError:
        return len(reference)


def naive_checkpoints(model: nn.Module) -> None:
    """What a user would write."""
    for block in find_blocks(model).values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class BlockFacts(TorchDispatchMode):
    """What a block's forward pass produced, and which of it stays as it is until the end of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, int]] = []
        self.outputs: list[tuple[int, Tensor, int]] = []
        self.ordinal = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in activations.KEEPABLE_OPS:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                        self.outputs.append((self.ordinal, leaf.detach(), leaf._version))
            self.ordinal += 1
        return result

    @property
    def recomputable(self) -> bool:
        return all(tensor._version == version for tensor, version in self.inputs)

    @property
    def keepable(self) -> tuple[int, ...]:
        changed = {ordinal for ordinal, tensor, version in self.outputs if tensor._version != version}
        return tuple(ordinal for ordinal in range(self.ordinal) if ordinal not in changed)


def block_facts(recipe: Recipe) -> dict[str, BlockFacts]:
    model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
    facts = {path: _watched(block) for path, block in find_blocks(model.train()).items()}
    model(torch.randn(2, 3, PX, PX))
    return facts


def _watched(block: nn.Module) -> BlockFacts:
    facts, forward = BlockFacts(), block.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        facts.inputs += [(leaf, leaf._version) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with facts:
            return forward(*args, **kwargs)

    block.forward = watched
    return facts


def policies(facts: dict[str, BlockFacts], kind: str) -> dict[str, BlockPolicy]:
    """The policy on every block that allows it."""
    if kind == "none":
        return {}
    if kind == "offload":
        return dict.fromkeys(facts, BlockPolicy(host="all"))
    if kind == "offload_part":
        return dict.fromkeys(facts, BlockPolicy(host=tuple(range(1, 64, 2))))
    if kind.startswith("again"):
        every, host = (2, tuple(range(1, 128, 2))) if kind == "again_offload" else (1, ())
        policy = BlockPolicy(again=tuple(range(0, 128, every)), host=host)
        return dict.fromkeys((STEM, *facts), policy)
    usable = {path: fact for path, fact in facts.items() if fact.recomputable}
    if kind == "full":
        return dict.fromkeys(usable, BlockPolicy(recompute="full"))
    every = 2 if kind == "dropped" else 1
    host = "all" if kind == "selective_offload" else "none"
    return {
        path: BlockPolicy(recompute="selective", keep=fact.keepable[::every], host=host)
        for path, fact in usable.items()
    }


if __name__ == "__main__":
    main()
