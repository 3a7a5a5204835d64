"""The file of `lowmem bench`: every round of every device and budget, with all that is needed to read it elsewhere."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lowmem.benchmarking.statistics import Spread, is_stable, spread
from lowmem.disk import replace_file
from lowmem.errors import LowmemError
from lowmem.machine import Machine
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe

SYNTHETIC = "synthetic"
"""The `data` of a bench that loads no photographs."""
FORMAT = "lowmem bench 1"
Outcome = Literal["pending", "measured", "refused", "failed"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Round(Frozen):
    """One visit to a device: `num_steps` steps in a row, timed as a whole. `joules` is None where nothing counts them."""

    num_steps: int
    seconds: float
    wait_data_s: float = 0.0
    joules: float | None = None

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps


class Memory(Frozen):
    """Most bytes in use during the steps: of tensors, held by the allocator, and held by the process as the driver sees it."""

    peak_bytes: int = 0
    reserved_bytes: int | None = None
    process_bytes: int | None = None

    def most(self, other: "Memory") -> "Memory":
        both = {name: (getattr(self, name), getattr(other, name)) for name in type(self).model_fields}
        return Memory(**{name: max((v for v in pair if v is not None), default=None) for name, pair in both.items()})


class Row(Frozen):
    """One device in one budget."""

    device: str
    device_name: str
    budget_bytes: int
    outcome: Outcome = "pending"
    reason: str = ""
    """Why a budget was refused or failed."""
    same_as_bytes: int | None = None
    """The budget whose plan and rounds these are, where the plan is the same and a budget changes nothing else."""
    plan: Plan | None = None
    rounds: tuple[Round, ...] = ()
    memory: Memory = Memory()

    def with_round(self, found: Round, memory: Memory) -> "Row":
        return self.model_copy(
            update={"outcome": "measured", "rounds": (*self.rounds, found), "memory": self.memory.most(memory)}
        )

    @property
    def step_s(self) -> Spread:
        """Seconds per step over the rounds; only for measured rows."""
        return spread([each.step_s for each in self.rounds])

    @property
    def is_stable(self) -> bool:
        return is_stable([each.step_s for each in self.rounds])

    @property
    def wait_frac(self) -> float:
        """Share of the time in which the device waited for images."""
        return sum(each.wait_data_s for each in self.rounds) / sum(each.seconds for each in self.rounds)

    def joules_per_image(self, batch_size: int) -> float | None:
        counted = [each for each in self.rounds if each.joules is not None]
        images = batch_size * sum(each.num_steps for each in counted)
        return sum(each.joules or 0.0 for each in counted) / images if images else None


class BenchFile(Frozen):
    """A whole bench; `num_images` is the epoch that is spoken of."""

    format: Literal["lowmem bench 1"] = FORMAT
    command: str
    started: str
    finished: bool = False
    """Whether it ran to its end or was interrupted."""
    machine: Machine
    cudnn: int | None = None
    torch_threads: int
    recipe_name: str
    recipe: Recipe
    num_classes: int
    num_images: int
    data: str
    """`synthetic`, or the folder whose images were loaded."""
    rows: tuple[Row, ...] = ()

    def epoch_s(self, row: Row, num_images: int | None = None) -> float:
        """Seconds of an epoch's training steps, without validation."""
        return row.step_s.median * max(1, (num_images or self.num_images) // self.recipe.batch.size)

    def save(self, path: Path) -> None:
        replace_file(path, self.model_dump_json(indent=1) + "\n")


def is_bench_file(path: Path) -> bool:
    """Whether a file calls itself a bench, of whatever version."""
    try:
        return path.is_file() and str(_parsed(path).get("format", "")).startswith("lowmem bench")
    except LowmemError:
        return False


def load_bench(path: Path) -> BenchFile:
    """Raises LowmemError where the file is missing, no bench, or of another version."""
    facts = _parsed(path)
    if facts.get("format") != FORMAT:
        raise LowmemError(f"{path} is no file of lowmem bench (its format is {facts.get('format')!r}, not {FORMAT!r}).")
    try:
        return BenchFile.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LowmemError(f"{path}: {where}: {first['msg']}. Make it again with lowmem bench --out {path}.") from None


def _parsed(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowmemError(f"{path}: {error.strerror}. Give a file that lowmem bench wrote.") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise LowmemError(f"{path} is not JSON. Give a file that lowmem bench wrote.") from None
    return facts if isinstance(facts, dict) else {}
