"""Workers of every kind give the same batches; those that die or hang are noticed, named and replaced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from lowmem.data import lost, processes, shared, workers
from lowmem.data.processes import ProcessWorkers
from lowmem.data.workers import Order, open_workers
from lowmem.errors import LowmemError
from lowmem.planning.plan import LoaderPlan
from tests.data import arrivals

NUM = 24
MEMORIES = [shared.new_memory, shared.NamedMemory]


def images(found, source=0, indices=range(NUM), num_orders=4, epoch=1):
    """The pixels of some orders that were all given before the first result was asked for."""
    jobs = [found.start(Order(source, epoch + number, np.array(indices), 16)) for number in range(num_orders)]
    return np.concatenate([job.result().numpy() for job in jobs])


def opened(kind, num_workers, source, told=None):
    return open_workers(
        LoaderPlan(kind=kind, workers=num_workers), [source], (lambda text: None) if told is None else told.append
    )


def made_by(kind, num_workers, source):
    found = opened(kind, num_workers, source)
    try:
        return images(found)
    finally:
        found.close()


@pytest.mark.parametrize(("kind", "num_workers"), [("threads", 1), ("threads", 3), ("processes", 1), ("processes", 3)])
def test_all_kinds_make_the_same_pixels_and_a_stateful_source_does_not(kind, num_workers):
    assert np.array_equal(made_by(kind, num_workers, arrivals.of_index), made_by("inline", 0, arrivals.of_index))
    if num_workers > 1:
        assert not np.array_equal(
            made_by(kind, num_workers, arrivals.of_arrival), made_by("inline", 0, arrivals.of_arrival)
        )


@pytest.mark.parametrize("new_memory", MEMORIES)
def test_both_kinds_of_shared_memory_work_and_leave_nothing(monkeypatch, new_memory):
    monkeypatch.setattr(processes, "new_memory", new_memory)
    before = set(os.listdir("/dev/shm")) if sys.platform == "linux" else set()
    assert np.array_equal(made_by("processes", 2, arrivals.of_index), made_by("inline", 0, arrivals.of_index))
    if sys.platform == "linux":
        assert set(os.listdir("/dev/shm")) == before
    assert not [child for child in psutil.Process().children() if "lowmem.data.worker" in " ".join(child.cmdline())]


def test_a_worker_has_neither_torch_nor_pydantic(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_TEST_OUT", str(tmp_path / "modules"))
    made_by("processes", 1, arrivals.modules)
    assert (tmp_path / "modules").read_text() == ""


def test_what_a_library_prints_does_not_disturb(capfd):
    assert np.array_equal(made_by("processes", 1, arrivals.prints), made_by("inline", 0, arrivals.of_index))


@pytest.mark.parametrize("kind", ["inline", "threads", "processes"])
def test_an_image_that_cannot_be_read_is_named_and_the_workers_go_on(kind):
    found = opened(kind, 2, arrivals.fails)
    with pytest.raises(LowmemError, match="image 7 can no longer be read: OSError: gone"):
        images(found)
    assert images(found, indices=range(8, 12), num_orders=1).shape == (4, 16, 16, 3)
    found.close()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_worker_that_is_killed_is_named_and_replaced_in_the_same_order():
    told = []
    found = opened("processes", 2, arrivals.slow, told)
    wait_for(lambda: all(worker.started for worker in found.workers))
    jobs = [found.start(Order(0, epoch, np.arange(NUM), 16)) for epoch in (1, 2, 3)]
    victim = found.workers[0].process.pid
    os.kill(victim, signal.SIGKILL)
    made = np.concatenate([job.result().numpy() for job in jobs])
    assert np.array_equal(made, made_by("inline", 0, arrivals.of_index)[: len(made)])
    assert len(told) == 1 and f"(process {victim}) died (SIGKILL)" in told[0] and "Another takes its place" in told[0]
    found.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_worker_that_hangs_is_noticed_within_ten_seconds(monkeypatch):
    told = []
    found = opened("processes", 2, arrivals.slow, told)
    wait_for(lambda: all(worker.started for worker in found.workers))
    job = found.start(Order(0, 1, np.arange(NUM), 16))
    os.kill(found.workers[1].process.pid, signal.SIGSTOP)
    started = time.monotonic()
    made = job.result().numpy()
    assert time.monotonic() - started < 10
    assert np.array_equal(made, made_by("inline", 0, arrivals.of_index)[:NUM])
    assert "gave no sign of life" in told[0]
    found.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_worker_taken_by_the_memory_killer_is_named_as_that_and_not_replaced(monkeypatch):
    """The kernel's counter of memory kills is a fact of the system that a test cannot make true; it is replaced."""
    kills = iter([0, 1, 2])
    monkeypatch.setattr(lost, "num_oom_kills", lambda: next(kills))
    told = []
    found = opened("processes", 2, arrivals.slow, told)
    wait_for(lambda: all(worker.started for worker in found.workers))
    job = found.start(Order(0, 1, np.arange(NUM), 16))
    os.kill(found.workers[0].process.pid, signal.SIGKILL)
    assert np.array_equal(job.result().numpy(), made_by_inline_once())
    assert "ended by the system's memory killer" in told[0] and len(found.workers) == 1
    job = found.start(Order(0, 1, np.arange(NUM), 16))
    os.kill(found.workers[0].process.pid, signal.SIGKILL)
    with pytest.raises(LowmemError, match="memory killer.*it was the last one"):
        job.result()
    found.close()


def made_by_inline_once():
    return made_by("inline", 0, arrivals.of_index)[:NUM]


def test_an_image_that_ends_every_worker_stops_the_run_by_name():
    found = opened("processes", 2, arrivals.deadly)
    with pytest.raises(LowmemError, match="the second one at the same images.*image 5"):
        images(found, indices=range(8), num_orders=1)
    found.close()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_image_that_takes_long_is_named_and_given_up_in_the_end(kind, monkeypatch):
    for module in (workers, processes):
        monkeypatch.setattr(module, "SLOW_S", 0.1)
    monkeypatch.setattr(workers, "GIVE_UP_S", 0.6)
    told = []
    found = opened(kind, 1, arrivals.sleeper, told)
    with pytest.raises(LowmemError, match=r"image 0 has not come for \d s"):
        images(found, indices=range(1), num_orders=1)
    assert len(told) == 1 and "image 0 has been loading" in told[0]
    found.close()


def test_abandoned_batches_leave_the_workers_free():
    found = opened("processes", 2, arrivals.slow)
    for job in [found.start(Order(0, 1, np.arange(NUM), 16)) for _ in range(5)]:
        job.cancel()
    assert np.array_equal(images(found, num_orders=1), made_by_inline_once())
    wait_for(lambda: sum(len(free) for free in found.free_blocks.values()) == 5 or not found.workers[0].tasks)
    found.close()


def test_workers_need_no_main_guard_and_end_with_a_killed_parent(tmp_path):
    """A script without `if __name__ == "__main__"`, killed in the middle."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nimport numpy as np\nfrom lowmem.data.workers import Order, open_workers\n"
        "from lowmem.planning.plan import LoaderPlan\nfrom tests.data import arrivals\n"
        "found = open_workers(LoaderPlan(kind='processes', workers=2), [arrivals.slow])\n"
        "found.start(Order(0, 1, np.arange(8), 16)).result()\n"
        "print(*[w.process.pid for w in found.workers], flush=True)\ntime.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_the_file_index_is_shared_not_copied():
    """A source with a large array: each worker's own memory stays far below it."""
    source = arrivals.Large(np.zeros(200_000_000, dtype=np.uint8))
    found = ProcessWorkers([source], 2, False, lambda text: None)
    images(found, num_orders=1)
    own = [psutil.Process(worker.process.pid).memory_full_info().uss for worker in found.workers]
    assert max(own) < 120_000_000
    found.close()
