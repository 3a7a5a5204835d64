"""The run folder: where everything that a run leaves behind is."""

import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lowmem.data.folder import Dataset
from lowmem.data.shrunk import Cache
from lowmem.disk import REAL_DISK, Disk, replace_file, writing
from lowmem.errors import LowmemError
from lowmem.machine import Machine
from lowmem.planning.plan import Plan, load_plan
from lowmem.recipe import Recipe, load_recipe
from lowmem.sizes import format_size

NUM_LISTED = 20
OWN_NAMES = {"plan.json", "machine.json", "data.json", "images.tsv", "events.jsonl", "run.lock"}
"""What a new run writes before recipe.toml, which comes last: without it, nothing has been trained."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def machine(self) -> Path:
        return self.path / "machine.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def images(self) -> Path:
        return self.path / "images.tsv"

    @property
    def epochs(self) -> Path:
        return self.path / "epochs.csv"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def classifier(self) -> Path:
        return self.path / "classifier"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    def write_facts(self, recipe: Recipe, plan: Plan, machine: Machine, dataset: Dataset) -> None:
        facts: dict[str, Any] = {"root": str(dataset.root), "fingerprint": dataset.fingerprint, "classes": list(dataset.classes)}
        if dataset.cache is not None:
            facts["cache"] = [str(dataset.cache.folder), dataset.cache.limit_bytes]
        with writing(self.path, "the facts of the run"):
            self.write_plan(plan)
            replace_file(self.machine, machine.model_dump_json(indent=2) + "\n")
            replace_file(self.data, json.dumps(facts, indent=2) + "\n")
            images = "".join(f"{line}\n" for line in sorted(dataset.entries()))
            replace_file(self.images, images, errors="surrogateescape")
            self.write_recipe(recipe)

    def write_plan(self, plan: Plan) -> None:
        with writing(self.plan, "the plan"):
            replace_file(self.plan, plan.model_dump_json(indent=2) + "\n")

    def write_recipe(self, recipe: Recipe, note: str = "") -> None:
        """Write recipe.toml; notes of changes made on purpose stay at its top, oldest first."""
        notes = []
        if self.recipe.is_file():
            lines = self.recipe.read_text(encoding="utf-8").splitlines()
            notes = [line for line in lines if line.startswith("# ")]
        notes += [f"# {note}"] if note else []
        with writing(self.recipe, "the recipe"):
            replace_file(self.recipe, "".join(f"{line}\n" for line in notes) + recipe.to_toml())

    def refuse_too_small(self, checkpoint_bytes: int, classifier_bytes: int, disk: Disk = REAL_DISK) -> None:
        """Raises LowmemError where the disk has no room for the checkpoints and classifiers that exist at the same time."""
        held = sum(p.stat().st_size for p in self.path.rglob("*.safetensors")) if self.path.is_dir() else 0
        needed = 3 * checkpoint_bytes + 2 * classifier_bytes
        free = disk.free_bytes(self.path) + held
        if free < needed:
            raise LowmemError(
                f"{self.path}: the disk is too small: three checkpoints and two classifiers, which exist for a moment at the same time, "
                f"need {format_size(needed)} ({needed} bytes); {format_size(free)} ({free} bytes) are free. Name another folder with --out, "
                f"or make room."
            )

    def data_root(self) -> Path:
        """The data folder that the run was started with."""
        return Path(json.loads(self.data.read_text(encoding="utf-8"))["root"])

    def data_fingerprint(self) -> str:
        """The fingerprint of the images that the run was started with."""
        return str(json.loads(self.data.read_text(encoding="utf-8"))["fingerprint"])

    def cache(self) -> Cache | None:
        """Where the run was started to keep its shrunk images; None where it was started with images as they are."""
        kept = json.loads(self.data.read_text(encoding="utf-8")).get("cache")
        return None if kept is None else Cache(Path(kept[0]), kept[1])

    def check_same_data(self, dataset: Dataset, fingerprint: str) -> None:
        """Raises LowmemError with the difference where the images are not those that the run was started with."""
        if dataset.fingerprint == fingerprint:
            return
        before = set(self.images.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
        now = set(dataset.entries())
        changes = [f"  gone or changed: {line}" for line in sorted(before - now)] + [
            f"  new or changed: {line}" for line in sorted(now - before)
        ]
        more = f"\n  and {len(changes) - NUM_LISTED} more" if len(changes) > NUM_LISTED else ""
        told = "\n".join(changes[:NUM_LISTED]).replace("\t", " ")
        raise LowmemError(
            f"The images are not those that this run was started with:\n{told}{more}\nPut them back, or start a new run."
        )

    def record(self, event: str, **facts: Any) -> None:
        """Append a line to events.jsonl."""
        line = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), "event": event, **facts}
        with writing(self.events, "the log of events"), open(self.events, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def read_recipe(self) -> Recipe:
        return load_recipe(str(self.recipe))

    def read_plan(self) -> Plan:
        return load_plan(self.plan)


def new_run_folder(path: Path | None, recipe_name: str) -> RunFolder:
    """An empty folder for a new run, by default runs/RECIPE-DATE-TIME; raises LowmemError where it cannot be had."""
    if path is None:
        path = Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if path.exists():
            path = path.with_name(f"{path.name}-{os.getpid()}")
    if path.exists() and not _is_unused(path):
        raise LowmemError(
            f"--out {path}: exists and is not empty. Continue it with lowmem resume {path}, or name another folder."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe.partial"
        probe.write_bytes(b"lowmem")
        probe.unlink()
    except OSError as error:
        raise LowmemError(
            f"--out {path}: cannot be written: {error.strerror}. Name another folder with --out."
        ) from None
    return RunFolder(path)


def _is_unused(path: Path) -> bool:
    """An empty folder, or what a run left that was killed before it had written its recipe."""
    if not path.is_dir():
        return False
    return all(item.name in OWN_NAMES or item.name.endswith(".partial") for item in path.iterdir())


def open_run_folder(path: Path) -> RunFolder:
    """The folder of an earlier run; raises LowmemError where it is none."""
    folder = RunFolder(path)
    if not folder.recipe.is_file() or not folder.plan.is_file():
        raise LowmemError(
            f"{path} is not a run folder: it has no recipe.toml and plan.json. Run folders are made by lowmem train."
        )
    return folder
