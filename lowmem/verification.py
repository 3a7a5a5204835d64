"""Proof that a plan changes nothing: it is trained beside the unconstrained run, and every tensor of the state is compared.

Both runs start from the same weights, see the same batches and go through the real Engine. The unconstrained run keeps every
activation, holds the optimizer on the device and runs whole atoms.

How the claims are checked:
- `bitwise`: no tensor of the state differs in any bit.
- `rounding`: the whole of each kind of state lies within a tolerance. AdamW turns a gradient that is nothing but rounding
  (a bias in front of a norm) into a step of full length, so single entries say little; the norm over all entries does.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.errors import LowmemError
from lowmem.planning.plan import Exactness, Plan
from lowmem.recipe import Recipe
from lowmem.sizes import format_size
from lowmem.training.ema import PREFIX, is_ema
from lowmem.training.engine import Engine, OutOfBudgetError
from lowmem.training.model import initialised_model

ROUNDING_TOLERANCE = {"fp32": 0.01, "bf16": 0.15, "fp16": 0.05}
"""Largest relative difference of a kind of state under the claim `rounding`, by the arithmetic of the forward pass."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
State = dict[str, dict[str, Tensor]]
"""Tensors by kind (weights, buffers, optimizer, average) and name."""


@dataclass(frozen=True)
class KindComparison:
    """One kind of state: `relative` is the norm of the difference over that of the reference (for weights and their average, of their change)."""

    kind: str
    num_entries: int
    num_differing: int
    max_abs: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """What `verify` found."""

    claim: Exactness
    steps: int
    kinds: tuple[KindComparison, ...]
    tolerance: float
    finite: bool
    """Whether the reference stayed finite; nothing is proved where it did not."""
    reference_peak_bytes: int
    plan_peak_bytes: int
    warnings: tuple[str, ...] = ()
    """Operations that torch says it cannot run deterministically on this device."""

    @property
    def num_entries(self) -> int:
        return sum(kind.num_entries for kind in self.kinds)

    @property
    def num_differing(self) -> int:
        return sum(kind.num_differing for kind in self.kinds)

    @property
    def holds(self) -> bool:
        """Whether the plan's claim holds; `statistical` claims nothing."""
        if self.claim == "statistical":
            return True
        if self.claim == "bitwise":
            return self.finite and self.num_differing == 0
        return self.finite and all(kind.relative <= self.tolerance for kind in self.kinds)

    def lines(self) -> list[str]:
        """The comparison for the terminal."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        lines = [
            f"After {steps}: {self.num_differing} of {self.num_entries} tensors of the state differ from the unconstrained run."
        ]
        lines += [_kind_line(kind) for kind in self.kinds]
        lines.append(
            f"  measured peak: unconstrained {format_size(self.reference_peak_bytes)}, plan {format_size(self.plan_peak_bytes)}"
        )
        lines += [f"  torch has no deterministic kernel: {warning}" for warning in self.warnings]
        if not self.finite:
            lines.append(
                "  the unconstrained run itself is not finite: nothing is proved. A smaller optimizer.lr may help."
            )
        within = f" (within {self.tolerance:g} relative)" if self.claim == "rounding" else ""
        lines.append(f"The plan claims {self.claim}{within}: {'holds' if self.holds else 'DOES NOT HOLD'}.")
        return lines


def verify(
    recipe: Recipe, plan: Plan, num_classes: int, steps: int = 3, batches: Sequence[HostBatch] | None = None
) -> Comparison:
    """Train the unconstrained run and the plan from the same start and compare their states.

    `batches`: one per step, of the recipe's size; seeded random ones where absent. Raises LowmemError where either run does
    not fit into memory.
    """
    model, _ = initialised_model(recipe.model, num_classes, recipe.seed)
    batches = random_batches(recipe, num_classes, steps) if batches is None else batches
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with _deterministic() as seen:
        reference, reference_peak = _trained(
            copy.deepcopy(model), recipe, reference_plan(plan, recipe), num_classes, batches
        )
        state, plan_peak = _trained(
            model, recipe, plan.model_copy(update={"cudnn_benchmark": False}), num_classes, batches
        )
    return Comparison(
        claim=plan.exactness,
        steps=len(batches),
        kinds=tuple(_compare(kind, reference[kind], state[kind], start) for kind in reference),
        tolerance=ROUNDING_TOLERANCE[plan.amp_dtype],
        finite=all(bool(torch.isfinite(tensor).all()) for kind in reference.values() for tensor in kind.values()),
        reference_peak_bytes=reference_peak,
        plan_peak_bytes=plan_peak,
        warnings=tuple(
            sorted({str(item.message).splitlines()[0][:120] for item in seen if "determinis" in str(item.message)})
        ),
    )


def reference_plan(plan: Plan, recipe: Recipe) -> Plan:
    """The unconstrained run in the same arithmetic, all of it in the network's own layout."""
    changes = {
        "blocks": {},
        "layouts": {},
        "compiled": "none",
        "optimizer": "device",
        "micro_batch": recipe.batch.atom,
        "budget": None,
        "cudnn_benchmark": False,
    }
    return plan.model_copy(update=changes | {"autocast_cache": True, "exactness": "bitwise", "prediction": None})


def _trained(
    model: nn.Module, recipe: Recipe, plan: Plan, num_classes: int, batches: Sequence[HostBatch]
) -> tuple[State, int]:
    """The state after the batches, on the CPU, and the peak of training."""
    weights = {name for name, _ in model.named_parameters()}
    config = getattr(model, "pretrained_cfg", {})
    norm = Normalisation(tuple(config.get("mean", (0.5,) * 3)), tuple(config.get("std", (0.5,) * 3)))
    engine = Engine(model, recipe, plan, torch.ones(num_classes, dtype=torch.int64))
    try:
        device_input = DeviceInput(norm, engine.device, plan.memory_format, recipe.mixup, recipe.seed)
        engine.enforcement.reset_peak()
        for step, batch in enumerate(batches):
            engine.train_step(batch, device_input, epoch=1, step=step, lr=recipe.optimizer.lr)
        tensors, peak_bytes = engine.model_tensors(), engine.enforcement.peak_bytes
        state = {
            "weights": {name: tensor for name, tensor in tensors.items() if name in weights},
            "buffers": {name: tensor for name, tensor in tensors.items() if name not in weights},
        }
        for name, tensor in engine.optimizer_tensors().items():
            state.setdefault("average" if is_ema(name) else "optimizer", {})[name] = tensor
    except OutOfBudgetError as error:
        which = "plan" if plan.budget else "unconstrained run, which must fit for a comparison,"
        raise LowmemError(
            f"The {which} ran out of memory: {error}. Try a smaller model or --set batch.size=..."
        ) from None
    finally:
        engine.close()
    return state, peak_bytes


def _compare(
    kind: str, reference: dict[str, Tensor], state: dict[str, Tensor], start: dict[str, Tensor]
) -> KindComparison:
    num_differing, max_abs, difference_sq, scale_sq = 0, 0.0, 0.0, 0.0
    for name, expected in reference.items():
        is_count = name.startswith("step/") or not expected.is_floating_point()
        begun = start.get(name.removeprefix(PREFIX)) if kind in ("weights", "average") else None
        origin = 0.0 if begun is None else begun.double()
        scale_sq += 0.0 if is_count else float((expected.double() - origin).square().sum())
        if same_bits(expected, state[name]):
            continue
        num_differing += 1
        difference = expected.double() - state[name].double()
        if is_count:  # rounding never changes a count
            difference_sq = float("inf")
        max_abs = max(max_abs, float(difference.abs().nan_to_num(nan=float("inf")).max()))
        difference_sq += float(difference.square().sum())
    relative = 0.0 if num_differing == 0 else (difference_sq / scale_sq) ** 0.5 if scale_sq > 0 else float("inf")
    return KindComparison(kind, len(reference), num_differing, max_abs, relative)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in every bit: 0.0 is not -0.0, and a NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = BITS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(bits), b.detach().contiguous().view(bits))


def _kind_line(kind: KindComparison) -> str:
    found = "bitwise equal"
    if kind.num_differing:
        found = f"{kind.num_differing} differ, largest difference {kind.max_abs:.2g}, relative {kind.relative:.2g}"
    return f"  {kind.kind} ({kind.num_entries}): {found}"


@contextmanager
def _deterministic() -> Iterator[list[warnings.WarningMessage]]:
    """Context: deterministic kernels where torch has them; gives the warnings about those that it has not."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    try:
        with warnings.catch_warnings(record=True) as seen:
            yield seen
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
