"""Which layout each region of a network runs fastest in: each distinct convolution measured once on a machine, in both layouts.

Grouped convolutions may be many times slower in one layout than in the other, and which one depends on the device and its libraries
(pytorch #70954, #34977). Times are kept in the user's cache, by device and versions. A region is a run of blocks; what it costs to
convert its input and the gradient is measured too, and the cheapest sequence of layouts is found exactly.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from lowmem.disk import replace_file
from lowmem.errors import LowmemError
from lowmem.memory.layout import FORMATS
from lowmem.planning.kept import kept_file
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import Plan
from lowmem.sizes import format_size
from lowmem.training.step import AMP_DTYPES, autocast

LAYOUTS = tuple(FORMATS)
WARMUPS, REPEATS = 1, 5
MIN_GAIN_FRAC = 0.02
"""A gain below this share of the convolutions' time is within the noise of the measurement."""


@dataclass(frozen=True, order=True)
class Convolution:
    """One kind of convolution: input and weight shapes, and how it is called."""

    input_BCHW: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    dtype: str

    @property
    def key(self) -> str:
        return json.dumps(list(asdict(self).values()))


@dataclass
class LayoutTimes:
    """Seconds of forward and backward pass by convolution and layout; of converting a tensor there and its gradient back, per byte."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    convert_s_per_byte: float = 0.0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(asdict(self)))


@dataclass(frozen=True)
class Choice:
    """Layouts by block, empty where the network's own is best; seconds a step of all convolutions and conversions."""

    layouts: dict[str, str]
    chosen_s: float
    default_s: float
    converted_bytes: int = 0
    """Of the inputs that are converted; at most so much is held more than without."""

    @property
    def gain(self) -> float:
        return self.default_s / self.chosen_s


def refuse_layouts(layouts: str, allow: str) -> None:
    """Raises LowmemError where the option --layouts is none, or contradicts --allow."""
    if layouts not in ("default", "measured"):
        raise LowmemError(f"--layouts {layouts}: give default or measured.")
    if layouts == "measured" and allow == "bitwise":
        raise LowmemError(
            "--layouts measured forms sums in another order, which --allow bitwise rules out. Use --allow rounding, or leave one out."
        )


def convolutions_of(network: FakeNetwork, plan: Plan) -> tuple[dict[str, list[Convolution]], dict[str, int]]:
    """The convolutions of each block in forward order (those outside of blocks under ""), and the bytes of each block's input."""
    found: dict[str, list[Convolution]] = {"": [], **{path: [] for path in network.blocks}}
    input_bytes: dict[str, int] = {}
    dtype = AMP_DTYPES[plan.amp_dtype] or torch.float32
    owner = {id(m): path for path, block in network.blocks.items() for m in block.modules()}

    def see(module: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        kind = Convolution(
            tuple(args[0].shape), tuple(module.weight.shape), _pair(module.stride), _pair(module.padding), _pair(module.dilation),
            module.groups, str(dtype).removeprefix("torch."),
        )  # fmt: skip
        found[owner.get(id(module), "")].append(kind)

    def enter(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            input_bytes[path] = args[0].numel() * dtype.itemsize if args and isinstance(args[0], Tensor) else 0

        return note

    convolutions = [m for m in network.model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(see) for m in convolutions]
    hooks += [block.register_forward_pre_hook(enter(path)) for path, block in network.blocks.items()]
    px = network.recipe.data.train_px
    try:
        with network.fake(), torch.no_grad(), autocast(plan.model_copy(update={"device": "cpu"})):
            network.model(torch.empty(plan.micro_batch, 3, px, px).contiguous(memory_format=torch.channels_last))
    finally:
        for hook in hooks:
            hook.remove()
    return found, input_bytes


def measured_layouts(kinds: Iterable[Convolution], device: torch.device, path: Path) -> LayoutTimes:
    """Times of these convolutions: from `path` where they are known, else measured and added to it."""
    times = load_layout_times(path)
    missing = [kind for kind in sorted(set(kinds), key=lambda kind: kind.key) if kind.key not in times.seconds]
    if not times.convert_s_per_byte:
        times.convert_s_per_byte = _conversion_seconds_per_byte(device)
    for kind in missing:
        times.seconds[kind.key] = _measure(kind, device)
    if missing:
        times.save(path)
    return times


def load_layout_times(path: Path) -> LayoutTimes:
    """What was measured before; nothing where there is no such file or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seconds = {str(k): {name: float(row[name]) for name in LAYOUTS} for k, row in content["seconds"].items()}
        return LayoutTimes(seconds, float(content["convert_s_per_byte"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return LayoutTimes()


def layouts_file(device: torch.device) -> Path:
    """Where the times of a device are kept."""
    trial = ("by trial" if torch.backends.cudnn.benchmark else "by heuristic") if device.type == "cuda" else ""
    return kept_file("layouts", device, trial)


def cheapest_layouts(
    blocks: Sequence[tuple[str, Sequence[Convolution]]], input_bytes: dict[str, int], times: LayoutTimes, default: str
) -> Choice:
    """The sequence of layouts with the least time, conversions counted; the network's own where the gain is within the noise."""
    cost = {name: 0.0 if name == default else float("inf") for name in LAYOUTS}
    paths: dict[str, list[str]] = {name: [] for name in LAYOUTS}
    for path, kinds in blocks:
        convert_s = input_bytes.get(path, 0) * times.convert_s_per_byte
        own_s = {name: sum(times.seconds[kind.key][name] for kind in kinds) for name in LAYOUTS}
        steps = {
            name: min((cost[before] + (before != name) * convert_s, before) for before in LAYOUTS) for name in LAYOUTS
        }
        cost = {name: steps[name][0] + own_s[name] for name in LAYOUTS}
        paths = {name: [*paths[steps[name][1]], name] for name in LAYOUTS}
    best = min(LAYOUTS, key=cost.__getitem__)
    layouts = dict(zip((path for path, _ in blocks), paths[best]))
    default_s = sum(times.seconds[kind.key][default] for _, kinds in blocks for kind in kinds)
    if cost[best] > (1 - MIN_GAIN_FRAC) * default_s:
        return Choice({}, default_s, default_s)
    before = [default, *layouts.values()]
    converted = sum(input_bytes.get(path, 0) for path, old in zip(layouts, before) if layouts[path] != old)
    return Choice(layouts, cost[best], default_s, converted)


def choose_layouts(network: FakeNetwork, plan: Plan, device: torch.device, path: Path | None = None) -> Choice:
    """Measure what is not known yet, and choose."""
    found, input_bytes = convolutions_of(network, plan)
    blocks = [(name, kinds) for name, kinds in found.items() if name]
    times = measured_layouts((k for _, kinds in blocks for k in kinds), device, path or layouts_file(device))
    return cheapest_layouts(blocks, input_bytes, times, plan.memory_format)


def with_layouts(plan: Plan, choice: Choice) -> Plan:
    """The plan with another layout for some of its blocks, where it pays and the budget has room for what is converted.

    Other kernels form sums in another order, so it claims no more than rounding.
    """
    if not choice.layouts:
        return _told(plan, "No other memory layout of a block is faster here by more than the noise, as measured.")
    peak = plan.prediction.peak if plan.prediction else None
    if peak and plan.budget and peak.total + choice.converted_bytes > plan.budget.tensor_bytes:
        return _told(
            plan, f"Other memory layouts would be faster but need up to {format_size(choice.converted_bytes)} more."
        )
    others = sum(name != plan.memory_format for name in choice.layouts.values())
    changes: dict[str, object] = {"layouts": choice.layouts}
    if plan.exactness == "bitwise":
        changes["exactness"] = "rounding"
    if plan.prediction and peak:
        more = peak.model_copy(update={"activations": peak.activations + choice.converted_bytes})
        changes["prediction"] = plan.prediction.model_copy(update={"peak": more})
    text = (
        f"{others} of {len(choice.layouts)} blocks run in another memory layout than the network: their convolutions were measured here, "
        f"and all together take {choice.chosen_s / choice.default_s - 1:+.1%} of their time."
    )
    return _told(plan.model_copy(update=changes), text)


def _told(plan: Plan, text: str) -> Plan:
    return plan.model_copy(update={"reasons": (*plan.reasons, text)})


def _measure(kind: Convolution, device: torch.device) -> dict[str, float]:
    """Median seconds of forward and backward pass in each layout, taken in turn."""
    runs = {name: _run(kind, FORMATS[name], device) for name in LAYOUTS}
    taken: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for number in range(WARMUPS + REPEATS):
        for name in LAYOUTS if number % 2 else reversed(LAYOUTS):
            seconds = _timed(runs[name], device)
            if number >= WARMUPS:
                taken[name].append(seconds)
    return {name: median(values) for name, values in taken.items()}


def _run(kind: Convolution, memory_format: torch.memory_format, device: torch.device) -> Callable[[], None]:
    dtype = getattr(torch, kind.dtype)
    x = torch.randn(kind.input_BCHW, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(kind.weight, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    x.requires_grad_()
    weight.requires_grad_()
    call = (None, kind.stride, kind.padding, kind.dilation, kind.groups)
    with torch.no_grad():
        grad = torch.ones_like(nn.functional.conv2d(x, weight, *call))

    def run() -> None:
        torch.autograd.grad(nn.functional.conv2d(x, weight, *call), (x, weight), grad)

    return run


def _conversion_seconds_per_byte(device: torch.device) -> float:
    """Of a tensor to another layout and its gradient back."""
    x = torch.randn(8, 256, 28, 28, device=device).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        x.contiguous().contiguous(memory_format=torch.channels_last)

    return median(_timed(run, device) for _ in range(WARMUPS + REPEATS)) / x.nbytes


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def _pair(value: object) -> tuple[int, ...] | str:
    return value if isinstance(value, str | tuple) else (value, value)  # type: ignore[return-value]
