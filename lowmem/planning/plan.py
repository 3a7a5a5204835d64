"""Plan: everything that decides what a run costs, and nothing that decides which classifier it gives.

A plan is made by `planner.py`, saved with the run as JSON, and can be given back with `--plan FILE`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowmem.errors import LowmemError

Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]
Exactness = Literal["bitwise", "rounding", "statistical"]
Placement = Literal["device", "backward", "host", "host_backward"]
Recompute = Literal["none", "selective", "full"]
MemoryFormat = Literal["channels_last", "contiguous"]
Compiled = Literal["none", "blocks", "graphs"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlockPolicy(Frozen):
    """What happens to the activations that one block saves for its backward pass."""

    recompute: Recompute = "none"
    """`none` keeps everything; `selective` keeps the outputs named in `keep` and recomputes the rest; `full` keeps the
    block's inputs only."""
    keep: tuple[int, ...] = ()
    """For `selective`: which outputs are kept, as ordinals of the block's convolutions, matrix products and attention
    calls in the order of its forward pass."""
    host: Literal["none", "all"] | tuple[int, ...] = "none"
    """Which of the kept tensors live in pinned host memory between forward and backward. For `selective`, ordinals out of
    `keep`; for `none`, ordinals of the block's saved storages in the order in which they are saved. Not for `full`."""
    again: tuple[int, ...] = ()
    """For `none`: saved storages, by ordinal, that are not kept but made again from the others, each when it is needed."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "BlockPolicy":
        if self.recompute != "selective" and self.keep:
            raise ValueError("keep is for selective recomputation only")
        if self.recompute == "full" and self.host != "none":
            raise ValueError("a fully recomputed block keeps nothing that could be offloaded")
        if self.again and self.recompute != "none":
            raise ValueError("again names single tensors of a block that is not recomputed as a whole")
        if self.offloads and (self.again and self.host == "all" or set(self.again) & set(self.host)):
            raise ValueError("what is made again is not in host memory")
        return self

    @property
    def offloads(self) -> bool:
        return self.host not in ("none", ())

    @property
    def recomputes(self) -> bool:
        """Whether anything in the block is run again."""
        return self.recompute != "none" or bool(self.again)

    def __str__(self) -> str:
        kept = f" keeping {','.join(map(str, self.keep))}" if self.recompute == "selective" else ""
        host = (
            ""
            if not self.offloads
            else " offload"
            if self.host == "all"
            else f" offload {','.join(map(str, self.host))}"
        )
        again = f" again {','.join(map(str, self.again))}" if self.again else ""
        return f"{self.recompute}{kept}{again}{host}"


KEEP_ALL = BlockPolicy()
STEM = ""
"""Stands among the paths of blocks for what a network computes before its first block."""
RECOMPUTE_ALL = BlockPolicy(recompute="full")


class MemoryBreakdown(Frozen):
    """Bytes on the device at the moment of the peak, by what they are for."""

    weights: Bytes = 0
    ema: Bytes = 0
    gradients: Bytes = 0
    optimizer: Bytes = 0
    activations: Bytes = 0
    inputs: Bytes = 0
    workspace: Bytes = 0

    @property
    def total(self) -> int:
        return (
            self.weights + self.ema + self.gradients + self.optimizer + self.activations + self.inputs + self.workspace
        )


class BudgetLine(Frozen):
    """One line of the sum that turns `--vram` into the bytes that tensors may use."""

    what: str
    num_bytes: int
    in_allocator: bool = False
    """Whether the allocator hands these bytes out (rounding, fragmentation, workspaces) or somebody else has them (context,
    other processes)."""


class Budget(Frozen):
    """What `--vram` means on this device: `total_bytes`, less what tensors cannot have, is `tensor_bytes`."""

    total_bytes: Bytes
    deductions: tuple[BudgetLine, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        return self.total_bytes - sum(line.num_bytes for line in self.deductions)

    @property
    def allocator_bytes(self) -> int:
        """What the device's allocator is limited to."""
        return self.total_bytes - sum(line.num_bytes for line in self.deductions if not line.in_allocator)


class HostBudget(Frozen):
    """What `--ram` is spent on."""

    total_bytes: Bytes
    lines: tuple[BudgetLine, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines)


class LoaderPlan(Frozen):
    """How images reach the device; the sample stream is the same for every choice."""

    kind: Literal["inline", "threads", "processes"] = "threads"
    workers: Annotated[int, Field(ge=0)] = 2
    max_workers: Annotated[int, Field(ge=0)] = 0
    """Up to how many workers are added while the device waits for images; 0: none."""
    prefetch_batches: Count = 2
    """Batches ready or in the making, over all workers."""
    pin_memory: bool = False
    torch_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of torch's own kernels on the CPU; 0 leaves torch's choice."""

    @property
    def in_words(self) -> str:
        if self.kind == "inline" or not self.workers:
            return "Images loaded in line"
        what = "thread" if self.kind == "threads" else "process"
        plural = "" if self.workers == 1 else "s" if self.kind == "threads" else "es"
        return f"{self.workers} loader {what}{plural}"


class Prediction(Frozen):
    """What the planner expects of the plan, and where the times come from."""

    peak: MemoryBreakdown
    host_bytes: Bytes = 0
    step_s: float | None = None
    epoch_s: float | None = None
    baseline_step_s: float | None = None
    """Predicted step time of the same recipe with nothing recomputed, offloaded or moved."""
    time_source: Literal["profile", "measured", "roofline", "none"] = "none"


class Plan(Frozen):
    """How a recipe is trained on one device: its cost, never its result."""

    device: str
    """A torch device: `cpu` or `cuda:N`."""
    device_name: str
    amp_dtype: Literal["bf16", "fp16", "fp32"]
    """The recipe's amp, with `auto` settled by the device."""
    micro_batch: Count
    """Images per forward pass."""
    blocks: dict[str, BlockPolicy] = {}
    """Policies by the block's path in the model, and by "" for what is computed before the first block; a block that is not named
    keeps everything. Where one offloads or the stem has a policy, all are named."""
    num_blocks: Annotated[int, Field(ge=0)] = 0
    """How many blocks the model has."""
    optimizer: Placement = "device"
    memory_format: MemoryFormat = "channels_last"
    layouts: dict[str, MemoryFormat] = {}
    """Blocks with a layout of their own, by path; where one differs, every block is named."""
    compiled: Compiled = "none"
    """Whether the blocks that keep everything run through torch.compile, and are replayed as CUDA graphs."""
    autocast_cache: bool = True
    """Whether autocast keeps the 16-bit copies of the weights for the length of a forward pass."""
    cudnn_benchmark: bool = True
    eval_batch: Count = 32
    loader: LoaderPlan = LoaderPlan()
    gc: Literal["controlled", "default"] = "controlled"
    """`controlled`: objects frozen after set-up, collection at epoch ends only, never in the hot path."""
    exactness: Exactness = "bitwise"
    """`bitwise`: the same kernels on the same values as the unconstrained run; `rounding`: sums in another order;
    `statistical`: another classifier, never chosen unless the user allows it."""
    budget: Budget | None = None
    host: HostBudget | None = None
    """With `--ram`: what the run takes of host memory."""
    prediction: Prediction | None = None
    reasons: tuple[str, ...] = ()
    """The plan in words, a sentence each."""

    @property
    def num_recomputed(self) -> int:
        """Blocks of which anything is run again."""
        return sum(policy.recomputes for path, policy in self.blocks.items() if path != STEM)

    @property
    def num_offloaded(self) -> int:
        return sum(policy.offloads for path, policy in self.blocks.items() if path != STEM)

    def policy(self, block: str) -> BlockPolicy:
        return self.blocks.get(block, KEEP_ALL)

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_plan(path: Path) -> Plan:
    """The plan in a JSON file; raises LowmemError where it is missing or not a plan."""
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowmemError(f"--plan {path}: {error.strerror}. A plan is the file plan.json of a run folder.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not text"}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LowmemError(f"--plan {path}: not a plan: {where}: {first['msg']}.") from None
