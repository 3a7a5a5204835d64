"""What a run measured of itself, epoch by epoch: profile.json of a run folder."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lowmem.disk import replace_file
from lowmem.planning.plan import MemoryBreakdown, Prediction
from lowmem.sizes import format_size

SHORT_NAMES = {
    "waiting": "waiting",
    "copy": "copy",
    "forward": "forward",
    "recomputation": "recomputing",
    "backward": "backward",
    "optimizer": "optimizer",
    "evaluation": "evaluating",
    "checkpoint": "saving",
}
"""The phases that are told by name; what is left is `other`."""


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class StepTimes(Facts):
    """Seconds of the training steps of an epoch, without the wait for their images; `first_s` is the epoch's first step."""

    n: int
    median_s: float
    p10_s: float
    p90_s: float
    first_s: float


class EpochProfile(Facts):
    """One epoch, or the part of it since the run was last resumed."""

    epoch: int
    num_steps: int
    num_images: int
    total_s: float
    seconds: dict[str, float]
    """By phase, exclusive; together they are `total_s`."""
    step: StepTimes | None
    images_per_s: float
    """Of training, its waits included."""
    peak_bytes_meas: int
    peak_meas: MemoryBreakdown | None
    """What the peak of the first training step under the plan was for."""
    step_s_pred: float | None
    step_source: str
    peak_pred: MemoryBreakdown | None
    energy_j: float | None = None

    def share(self, phase: str) -> float:
        return self.seconds.get(phase, 0.0) / self.total_s if self.total_s else 0.0


class RunProfile(Facts):
    """`timed_by`: what the seconds were read from."""

    device: str
    device_name: str
    timed_by: Literal["the processor's clock", "CUDA events"]
    epochs: tuple[EpochProfile, ...] = ()

    def with_epoch(self, epoch: EpochProfile) -> "RunProfile":
        """An epoch that was trained again after a crash replaces its earlier figures."""
        kept = tuple(old for old in self.epochs if old.epoch < epoch.epoch)
        return self.model_copy(update={"epochs": (*kept, epoch)})

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def read_run_profile(path: Path) -> RunProfile:
    return RunProfile.model_validate_json(path.read_text(encoding="utf-8"))


def prediction_figures(prediction: Prediction | None) -> tuple[float | None, str, MemoryBreakdown | None]:
    """(seconds of a step, where they come from, the peak) of a plan's prediction."""
    if prediction is None:
        return None, "none", None
    return prediction.step_s, prediction.time_source, prediction.peak


def profile_line(profile: EpochProfile) -> str:
    """An epoch on one line: shares of its time, the step and the peak beside what was predicted."""
    shares = {name: profile.share(phase) for phase, name in SHORT_NAMES.items()}
    shares["other"] = 1 - sum(shares.values())
    told = [f"{name} {100 * share:.0f}" for name, share in shares.items() if share >= 0.005]
    return f"          {', '.join(told)} %; {', '.join(_comparisons(profile))}"


def _comparisons(profile: EpochProfile) -> list[str]:
    parts = []
    if profile.step is not None:
        predicted = "" if profile.step_s_pred is None else f" (predicted {1000 * profile.step_s_pred:.0f})"
        parts.append(f"step {1000 * profile.step.median_s:.0f} ms{predicted}")
    if profile.peak_meas is not None and profile.peak_pred is not None:
        parts.append(f"peak {format_size(profile.peak_meas.total)} (predicted {format_size(profile.peak_pred.total)})")
    if profile.energy_j is not None:
        parts.append(f"{profile.energy_j / max(1, profile.num_images):.2f} J an image")
    return parts
