"""Which loader a plan gets, and workers that are added while the device waits."""

import hashlib

import pytest

from lowmem.data.loader import Loader, Waiting
from lowmem.data.split import packed_split
from lowmem.data.workers import InlineWorkers
from lowmem.errors import LowmemError
from lowmem.planning import loading
from lowmem.planning.devices import device_by_name
from lowmem.planning.loading import loader_for
from lowmem.planning.plan import LoaderPlan, MemoryBreakdown, Plan, Prediction
from lowmem.recipe import load_recipe
from lowmem.sizes import GIB, MIB
from tests.data import arrivals

RECIPE = load_recipe("seresnextaa101d_32x8d")
CARD, CPU = device_by_name("RTX 4060 laptop"), device_by_name("cpu")


def plan(step_s=0.4, **loader):
    return Plan(
        device="cuda:0",
        device_name="card",
        amp_dtype="bf16",
        micro_batch=32,
        loader=LoaderPlan(**loader),
        prediction=Prediction(peak=MemoryBreakdown(weights=400 * MIB), host_bytes=2 * GIB, step_s=step_s),
    )


def test_the_number_of_workers_follows_the_images_cost_and_the_steps_time(monkeypatch):
    monkeypatch.setattr(loading, "usable_cores", lambda: 8)
    found = [
        loader_for(plan(step_s), RECIPE, CARD, image_s)[0]
        for step_s, image_s in ((0.4, 0.005), (0.4, 0.02), (0.05, 0.02))
    ]
    assert [loader.workers for loader in found] == [1, 2, 7]
    assert {loader.kind for loader in found} == {"processes"} and {loader.max_workers for loader in found} == {7}
    assert "16 would be needed, so the device will wait" in loader_for(plan(0.05), RECIPE, CARD, 0.02)[1]


def test_a_wish_is_followed_and_a_wrong_one_refused():
    assert loader_for(plan(), RECIPE, CARD, 0.01, "threads", 3)[0].in_words == "3 loader threads"
    assert loader_for(plan(), RECIPE, CPU, 0.01)[0].kind == "threads"
    assert loader_for(plan(), RECIPE, CARD, 0.01, workers=0)[0].in_words == "Images loaded in line"
    for wish in (("lots", None), ("auto", -1), ("threads", 1000)):
        with pytest.raises(LowmemError, match="--loader lots|--workers"):
            loader_for(plan(), RECIPE, CARD, 0.01, *wish)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("wait_s", "added"), [(0.1, 2), (0.001, 0)])
def test_workers_are_added_while_the_device_waits_up_to_the_limit(wait_s, added):
    clock, told = Clock(), []
    workers = InlineWorkers([], False)
    workers.num_workers = 1
    workers.add = lambda: setattr(workers, "num_workers", workers.num_workers + 1)
    waiting = Waiting(3, told.append, clock)
    for _ in range(100):
        with waiting:
            clock.now += wait_s
        clock.now += 1.0
        waiting.consider(workers)
    assert len(told) == added and workers.num_workers == 1 + added


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_that_are_added_change_no_image(tmp_path, kind):
    split = packed_split(tmp_path, [str(index) for index in range(96)], [0] * 96)
    digests = []
    for add_at in (None, 2):
        digest = hashlib.sha256()
        with Loader(split, arrivals.of_index, 16, 8, LoaderPlan(kind=kind, workers=1), shuffle_seed=0) as loader:
            for number, batch in enumerate(loader.batches(1)):
                digest.update(batch.images_BHWC.numpy().tobytes())
                if number == add_at:
                    loader.workers.add()
        digests.append(digest.hexdigest())
        assert loader.workers.num_workers == (1 if add_at is None else 2)
    assert digests[0] == digests[1]
