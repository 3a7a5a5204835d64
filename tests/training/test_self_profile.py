"""The profile that a run leaves of itself."""

import json

import pytest

from lowmem.planning.plan import BlockPolicy
from lowmem.results.run_profile import profile_line, read_run_profile
from lowmem.training.resume import ResumeRequest, resume_run
from lowmem.training.self_profile import step_times
from tests.training.conftest import THREADS


def test_a_run_says_where_its_time_and_memory_went(train_run, capsys):
    blocks = {name: BlockPolicy(recompute="full") for name in ("layer1.0", "layer2.0")}
    run = train_run("a", blocks=blocks, loader=THREADS)
    told = capsys.readouterr().out
    profile = read_run_profile(run / "profile.json")
    assert [epoch.epoch for epoch in profile.epochs] == [1, 2] and profile.timed_by == "the processor's clock"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rows = [event for event in events if event["event"] == "epoch"]
    for epoch, row in zip(profile.epochs, rows):
        assert epoch.num_steps == 4 and epoch.num_images == 32 and epoch.step.n == 4
        wanted = ("waiting", "copy", "forward", "recomputation", "backward", "optimizer", "evaluation", "checkpoint")
        assert all(epoch.seconds[name] > 0 for name in wanted)
        assert sum(epoch.seconds.values()) == pytest.approx(epoch.total_s, abs=1e-4)
        assert epoch.seconds["waiting"] == pytest.approx(row["wait_data_s"], abs=0.02)
        assert abs(epoch.total_s - row["seconds"]) < 0.25 * row["seconds"] + 0.05
        assert epoch.energy_j is None
        assert profile_line(epoch) in told
    peak = profile.epochs[0].peak_meas
    assert peak.total <= profile.epochs[0].peak_bytes_meas
    assert min(peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.inputs) > 0


def test_a_resumed_run_keeps_the_epochs_before(train_run):
    run = train_run("a")
    resume_run(ResumeRequest(run=run, overrides=("schedule.epochs=3",)))
    assert [epoch.epoch for epoch in read_run_profile(run / "profile.json").epochs] == [1, 2, 3]


def test_step_times_by_hand():
    times = step_times([0.5, 0.1, 0.2, 0.3, 0.4])
    assert (times.n, times.median_s, times.first_s) == (5, 0.3, 0.5)
    assert (times.p10_s, times.p90_s) == (0.14, 0.46)
    assert step_times([]) is None and step_times([0.2]).p90_s == 0.2
