"""Small models, their blocks, and the state after some steps through the real Engine."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.memory.activations import KEEPABLE_OPS
from lowmem.planning.plan import BlockPolicy, Plan
from lowmem.recipe import BatchRecipe, DataRecipe, ModelRecipe, OptimizerRecipe, Recipe
from lowmem.training.engine import Engine
from lowmem.training.model import build_model, initialised_model
from lowmem.verification import same_bits

NUM_CLASSES = 3
BLOCKS = {
    "test_resnet": ("layer1.0", "layer2.0", "layer3.0", "layer4.0"),
    "test_efficientnet": ("blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.3.0", "blocks.4.0"),
    "test_convnext": (
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.3.blocks.0",
    ),
    "test_vit": ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5"),
}


def make_recipe(
    name: str,
    size: int = 4,
    norm_batch: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    freeze: bool = False,
    clip_norm: float | None = None,
    px: int = 48,
) -> Recipe:
    return Recipe(
        model=ModelRecipe(name=name, weights="none", dropout=dropout, drop_path=drop_path, freeze_batchnorm=freeze),
        data=DataRecipe(train_px=px),
        batch=BatchRecipe(size=size, norm_batch=norm_batch),
        optimizer=OptimizerRecipe(lr=1e-3, clip_norm=clip_norm),
        amp="fp32",
    )


def make_plan(**changes: Any) -> Plan:
    usual = {"device": "cpu", "device_name": "CPU", "amp_dtype": "fp32", "micro_batch": 4, "cudnn_benchmark": False}
    return Plan.model_validate(usual | changes)


def make_engine(recipe: Recipe, plan: Plan) -> Engine:
    model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
    return Engine(model, recipe, plan, torch.ones(NUM_CLASSES, dtype=torch.int64))


def run_steps(engine: Engine, steps: Iterable[int]) -> None:
    steps = list(steps)
    batches = random_batches(engine.recipe, NUM_CLASSES, max(steps) + 1)
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, engine.plan.memory_format)
    for step in steps:
        engine.train_step(batches[step], device_input, epoch=1, step=step, lr=1e-3)


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Weights, statistics and optimizer state in one table."""
    return engine.model_tensors() | engine.optimizer_tensors()


def end_state(recipe: Recipe, plan: Plan, num_steps: int = 2) -> dict[str, Tensor]:
    engine = make_engine(recipe, plan)
    run_steps(engine, range(num_steps))
    state = state_of(engine)
    engine.close()
    return state


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the entries that do not agree in every bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str = "exp_avg/") -> float:
    """Norm of the difference over the norm of `a`; by default of the first moment, which is linear in the gradients."""
    names = [name for name in a if name.startswith(prefix)]
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in names)
    return (difference / sum(float(a[name].double().square().sum()) for name in names)) ** 0.5


def policies(name: str, kind: str) -> dict[str, BlockPolicy]:
    """A policy on every block: full, selective, dropped (every other output), offload, selective_offload."""
    if kind == "none":
        return {}
    if kind == "full":
        return {block: BlockPolicy(recompute="full") for block in BLOCKS[name]}
    if kind == "offload":
        return {block: BlockPolicy(host="all") for block in BLOCKS[name]}
    chosen = {}
    for block, keep in keepable(name).items():
        keep = keep[::2] if kind == "dropped" else keep
        chosen[block] = BlockPolicy(
            recompute="selective", keep=keep, host="all" if kind == "selective_offload" else "none"
        )
    return chosen


@cache
def keepable(name: str) -> dict[str, tuple[int, ...]]:
    """For each block the ordinals of outputs that nothing changes in place."""
    model = build_model(ModelRecipe(name=name, weights="none"), NUM_CLASSES).train()
    seen: dict[str, list[tuple[int, Tensor, int]]] = {}
    for block in BLOCKS[name]:
        _watch(model.get_submodule(block), seen.setdefault(block, []))
    model(torch.randn(2, 3, 48, 48))
    return {
        block: tuple(i for i, tensor, version in outputs if tensor._version == version)
        for block, outputs in seen.items()
    }


def _watch(block: nn.Module, outputs: list[tuple[int, Tensor, int]]) -> None:
    forward = block.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Outputs(outputs):
            return forward(*args, **kwargs)

    block.forward = watched  # type: ignore[method-assign]


class _Outputs(TorchDispatchMode):
    def __init__(self, outputs: list[tuple[int, Tensor, int]]) -> None:
        super().__init__()
        self.outputs, self.ordinal = outputs, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KEEPABLE_OPS:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                        self.outputs.append((self.ordinal, leaf.detach(), leaf._version))
            self.ordinal += 1
        return result
