"""What a profile measured and chose: profile.json, which `lowmem train --profile` follows."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lowmem.benchmarking.statistics import Spread, is_stable, spread
from lowmem.data.folder import Dataset
from lowmem.disk import replace_file
from lowmem.errors import LowmemError
from lowmem.machine import Machine, usable_cores
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.recipe import Recipe

FILE = "profile.json"
COSTLY_KEYS = ("model", "data", "augment", "batch", "amp", "ema")
"""Sections of a recipe that decide what a step or an image costs; others may change."""


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlanCase(Facts):
    """A plan that was measured on synthetic images: seconds of a step, a value for each round."""

    name: str
    plan: Plan
    rounds_s: tuple[float, ...] = ()
    peak_bytes: int = 0
    failure: str = ""

    @property
    def step(self) -> Spread:
        return spread(self.rounds_s)

    @property
    def is_stable(self) -> bool:
        return bool(self.failure) or is_stable(self.rounds_s)


class LoaderCase(Facts):
    """Workers by themselves, in a process of their own. Memory is PSS, or USS where a system has no PSS, over what was there before."""

    loader: LoaderPlan
    images_per_s: tuple[float, ...]
    extra_bytes: int
    memory_kind: Literal["pss", "uss"]


class JointCase(Facts):
    """The chosen plan with these workers and these images: seconds of a step with its wait, and the part that was the wait."""

    loader: LoaderPlan
    rounds_s: tuple[float, ...] = ()
    waits_frac: tuple[float, ...] = ()
    extra_bytes: int = 0
    failure: str = ""

    @property
    def step(self) -> Spread:
        return spread(self.rounds_s)

    @property
    def wait_frac(self) -> float:
        return spread(self.waits_frac).median

    @property
    def is_stable(self) -> bool:
        return bool(self.failure) or is_stable(self.rounds_s)


class ProfileFile(Facts):
    """`chosen` is None where the profile was stopped before any plan had been measured."""

    kind: Literal["lowmem profile"] = "lowmem profile"
    command: str
    started: str
    minutes: float
    seconds: float = 0.0
    finished: bool = False
    machine: Machine
    recipe_name: str
    recipe: Recipe
    data_root: str
    fingerprint: str
    num_classes: int
    num_train: int
    vram_bytes: int
    ram_bytes: int
    process_bytes: int = 0
    """Host memory of the training process itself, without loading."""
    plans: tuple[PlanCase, ...] = ()
    loaders: tuple[LoaderCase, ...] = ()
    joint: tuple[JointCase, ...] = ()
    plans_not_made: tuple[str, ...] = ()
    """For lack of time, in words."""
    ways: tuple[LoaderPlan, ...] = ()
    """All the ways of loading that there are; `loaders` and `joint` are those that were measured."""
    chosen: Plan | None = None
    sentences: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        replace_file(path, self.model_dump_json(indent=1) + "\n")


def load_profile(path: Path) -> ProfileFile:
    """The profile of a folder or a file; raises LowmemError where there is none."""
    file = path / FILE if path.is_dir() else path
    try:
        return ProfileFile.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowmemError(
            f"--profile {path}: {error.strerror}. Make one with: lowmem profile --vram 8G --data DIR --out FOLDER."
        ) from None
    except (ValidationError, UnicodeDecodeError):
        raise LowmemError(f"--profile {path}: not a profile. Give the folder that lowmem profile wrote.") from None


def plan_of_profile(path: Path, recipe: Recipe, device: str, device_name: str, dataset: Dataset) -> Plan:
    """The plan that a profile chose; raises LowmemError where it was made for another recipe, machine or data set."""
    profile = load_profile(path)
    if profile.chosen is None:
        raise LowmemError(f"--profile {path}: it was stopped before anything was measured. Run lowmem profile again.")
    again = "Measure again with lowmem profile, or leave --profile out."
    for key in COSTLY_KEYS:
        here, there = getattr(recipe, key), getattr(profile.recipe, key)
        if key == "model":
            here, there = here.model_copy(update={"weights": ""}), there.model_copy(update={"weights": ""})
        if here != there:
            raise LowmemError(f"--profile {path}: it was made for another {key}: {_difference(there, here)}. {again}")
    if (profile.chosen.device, profile.chosen.device_name) != (device, device_name):
        raise LowmemError(
            f"--profile {path}: it was made on {profile.chosen.device_name} ({profile.chosen.device}), and this run is on "
            f"{device_name} ({device}). {again}"
        )
    if profile.machine.cores != usable_cores():
        raise LowmemError(
            f"--profile {path}: it was made with {profile.machine.cores} cores; this process may use {usable_cores()}. {again}"
        )
    if profile.fingerprint != dataset.fingerprint:
        raise LowmemError(
            f"--profile {path}: it was made with other images ({profile.num_train} for training in {profile.data_root}; here are "
            f"{len(dataset.train)} in {dataset.root}). {again}"
        )
    return profile.chosen


def _difference(there: object, here: object) -> str:
    if not isinstance(there, BaseModel) or not isinstance(here, BaseModel):
        return f"{there}, and here is {here}"
    fields = [name for name in type(there).model_fields if getattr(there, name) != getattr(here, name)]
    name = fields[0]
    return f"{name} {getattr(there, name)}, and here is {getattr(here, name)}"
