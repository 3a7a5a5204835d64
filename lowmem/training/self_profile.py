"""The profile that every run makes of itself: where an epoch's time went, its peak, its energy, beside what was predicted.

Costs about twenty readings of a clock, or as many CUDA events, a step (benchmarks/self_profile.py), and touches no tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import torch

from lowmem.disk import writing
from lowmem.memory.energy import EnergyMeter
from lowmem.memory.limit import Enforcement
from lowmem.phases import STEP_PHASES, clock_for, timing_phases
from lowmem.planning.plan import Plan
from lowmem.results.run_profile import EpochProfile, RunProfile, StepTimes, prediction_figures, read_run_profile


class SelfProfile:
    """What a run measures of itself, kept in `path` from epoch to epoch."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        device = torch.device(plan.device)
        self.clock = clock_for(device)
        self.energy = EnergyMeter(device)
        self.profile = RunProfile(
            device=plan.device,
            device_name=plan.device_name,
            timed_by="CUDA events" if device.type == "cuda" else "the processor's clock",
            epochs=read_run_profile(path).epochs if path.is_file() else (),
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context around a run: its phases are timed."""
        self.clock.take()
        self.energy.take_j()
        with timing_phases(self.clock):
            yield

    def end_epoch(self, epoch: int, batch_size: int, plan: Plan, enforcement: Enforcement) -> EpochProfile:
        """The figures since the last epoch's end, written to the profile."""
        seconds, steps_s = self.clock.take()
        training_s = sum(seconds[name] for name in ("waiting", *STEP_PHASES))
        step_s_pred, source, peak_pred = prediction_figures(plan.prediction)
        found = EpochProfile(
            epoch=epoch,
            num_steps=len(steps_s),
            num_images=len(steps_s) * batch_size,
            total_s=round(sum(seconds.values()), 6),
            seconds={name: round(value, 6) for name, value in seconds.items()},
            step=step_times(steps_s),
            images_per_s=round(len(steps_s) * batch_size / max(training_s, 1e-9), 2),
            peak_bytes_meas=enforcement.peak_bytes,
            peak_meas=enforcement.peak_breakdown,
            step_s_pred=step_s_pred,
            step_source=source,
            peak_pred=peak_pred,
            energy_j=self.energy.take_j(),
        )
        self.profile = self.profile.with_epoch(found)
        with writing(self.path, "the run's profile"):
            self.profile.save(self.path)
        return found


def step_times(steps_s: list[float]) -> StepTimes | None:
    if not steps_s:
        return None
    tenths = quantiles(steps_s, n=10, method="inclusive") if len(steps_s) > 1 else steps_s * 9
    return StepTimes(
        n=len(steps_s),
        median_s=round(median(steps_s), 6),
        p10_s=round(tenths[0], 6),
        p90_s=round(tenths[-1], 6),
        first_s=round(steps_s[0], 6),
    )
