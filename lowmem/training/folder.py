"""The run folder: where everything that a run leaves behind is, and who is writing there."""

import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from lowmem.data.folder import Dataset
from lowmem.errors import LowmemError
from lowmem.machine import Machine
from lowmem.planning.plan import Plan, load_plan
from lowmem.recipe import Recipe, load_recipe

NUM_LISTED = 20


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
    def lock(self) -> Path:
        return self.path / "run.lock"

    def write_facts(self, recipe: Recipe, plan: Plan, machine: Machine, dataset: Dataset) -> None:
        self.recipe.write_text(recipe.to_toml(), encoding="utf-8")
        plan.save(self.plan)
        self.machine.write_text(machine.model_dump_json(indent=2) + "\n", encoding="utf-8")
        facts = {"root": str(dataset.root), "fingerprint": dataset.fingerprint, "classes": list(dataset.classes)}
        self.data.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self.images.write_text(
            "".join(f"{line}\n" for line in sorted(dataset.entries())), encoding="utf-8", errors="surrogateescape"
        )

    def data_root(self) -> Path:
        """The data folder that the run was started with."""
        return Path(json.loads(self.data.read_text(encoding="utf-8"))["root"])

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
        with open(self.events, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LowmemError(
            f"--out {path}: exists and is not empty. Continue it with lowmem resume {path}, or name another folder."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.write_bytes(b"lowmem")
        probe.unlink()
    except OSError as error:
        raise LowmemError(
            f"--out {path}: cannot be written: {error.strerror}. Name another folder with --out."
        ) from None
    return RunFolder(path)


def open_run_folder(path: Path) -> RunFolder:
    """The folder of an earlier run; raises LowmemError where it is none."""
    folder = RunFolder(path)
    if not folder.recipe.is_file() or not folder.plan.is_file():
        raise LowmemError(
            f"{path} is not a run folder: it has no recipe.toml and plan.json. Run folders are made by lowmem train."
        )
    return folder


class RunLock:
    """Context: the run folder is this process's alone. A lock left by a process that is gone does not count."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __enter__(self) -> "RunLock":
        for _ in range(2):
            try:
                with open(self.folder.lock, "x", encoding="utf-8") as file:
                    json.dump(_identity(os.getpid()), file)
                return self
            except FileExistsError:
                holder = self._holder()
                if holder is not None:
                    raise LowmemError(
                        f"{self.folder.path} is in use by another run (process {holder}). Wait for it or stop it."
                    ) from None
                self.folder.lock.unlink(missing_ok=True)
            except OSError as error:
                raise LowmemError(f"{self.folder.path}: cannot be written: {error.strerror}.") from None
        raise LowmemError(f"{self.folder.path} is in use by another run.")

    def __exit__(self, *_: object) -> None:
        self.folder.lock.unlink(missing_ok=True)

    def _holder(self) -> int | None:
        """Process that holds the lock; None where it has ended, however it did."""
        try:
            held = json.loads(self.folder.lock.read_text(encoding="utf-8"))
            alive = _identity(int(held["pid"])) == held
            return int(held["pid"]) if alive else None
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None


def _identity(pid: int) -> dict[str, float]:
    """A process beyond doubt: numbers are reused, start times are not."""
    return {"pid": pid, "started": round(psutil.Process(pid).create_time(), 1)}
