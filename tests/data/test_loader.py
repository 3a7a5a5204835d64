import hashlib
import itertools
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import embedded_images, open_dataset
from lowmem.data.loader import Loader, train_order
from lowmem.data.mixup import draw_mixup
from lowmem.data.pixels import EvalPixels, TrainPixels
from lowmem.errors import LowmemError
from lowmem.planning.plan import LoaderPlan
from lowmem.recipe import MixupRecipe, load_recipe

AUGMENT = load_recipe("seresnextaa101d_32x8d").augment


@pytest.fixture(scope="module")
def split():
    return open_dataset(embedded_images(), 0.2, 0).train


def stream(split, plan, pixels=None, epochs=(1, 2), resume_at=None):
    """Hash of every pixel, label and index of some epochs; `resume_at` stops there in each epoch and goes on with new workers."""
    digest = hashlib.sha256()
    pixels = pixels or TrainPixels(split, AUGMENT, 32, 0)
    parts = [(0, None)] if resume_at is None else [(0, resume_at), (resume_at, None)]
    for epoch, (start, stop) in itertools.product(epochs, parts):
        with Loader(split, pixels, 32, 48, plan, shuffle_seed=0) as loader:
            for batch in itertools.islice(loader.batches(epoch, start), None if stop is None else stop - start):
                update(digest, batch)
    return digest.hexdigest()


def update(digest, batch):
    for tensor in (batch.images_BHWC, batch.labels_B, batch.indices_B):
        digest.update(tensor.numpy().tobytes())


INLINE = LoaderPlan(kind="inline", workers=0)
PLANS = [
    LoaderPlan(kind="threads", workers=1, prefetch_batches=1),
    LoaderPlan(kind="threads", workers=2),
    LoaderPlan(kind="threads", workers=4, prefetch_batches=5),
    LoaderPlan(kind="processes", workers=2, prefetch_batches=3),
]
EVERY_PLAN = [INLINE] + [
    LoaderPlan(kind=kind, workers=workers, prefetch_batches=prefetch)
    for kind in ("threads", "processes")
    for workers in (1, 2, 4)
    for prefetch in (1, 2, 5)
]


def test_the_stream_is_the_same_for_all_workers_and_prefetches(split):
    reference = stream(split, INLINE)
    assert all(stream(split, plan) == reference for plan in PLANS)


@pytest.mark.slow
@pytest.mark.parametrize("plan", EVERY_PLAN, ids=lambda plan: f"{plan.workers}-{plan.kind}-{plan.prefetch_batches}")
def test_the_stream_is_the_same_for_every_plan_and_resumption(split, plan):
    reference = stream(split, INLINE, epochs=(1,))
    for resume_at in (None, *range(1, len(split) // 48)):
        assert stream(split, plan, epochs=(1,), resume_at=resume_at) == reference, resume_at


def ranks_stream(split, num_ranks, plan, ranks=None):
    """Hash of what the ranks get, put together batch by batch."""
    digest, pixels = hashlib.sha256(), TrainPixels(split, AUGMENT, 32, 0)
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(Loader(split, pixels, 32, 48, plan, shuffle_seed=0, rank=rank, num_ranks=num_ranks))
            for rank in ranks or range(num_ranks)
        ]
        for parts in zip(*(loader.batches(1) for loader in loaders), strict=True):
            tensors = zip(*((part.images_BHWC, part.labels_B, part.indices_B) for part in parts))
            update(digest, HostBatch(*map(torch.cat, tensors)))
    return digest.hexdigest()


def test_the_parts_of_all_ranks_are_the_batch_and_one_rank_too_few_is_not(split):
    reference = stream(split, INLINE, epochs=(1,))
    assert ranks_stream(split, 1, INLINE) == reference
    assert ranks_stream(split, 3, PLANS[1]) == ranks_stream(split, 5, PLANS[1]) == reference
    assert ranks_stream(split, 3, PLANS[1], ranks=(0, 1)) != reference
    assert ranks_stream(split, 3, PLANS[1], ranks=(0, 2, 1)) != reference


def test_draws_from_shared_state_would_not_be_the_same(split):
    """The negative control: numbers in order of arrival instead of by index."""
    random, lock = np.random.default_rng(0), threading.Lock()

    def arrival(epoch, index):
        import time

        with lock:
            drawn = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        time.sleep(1e-3 * (index % 3))
        return drawn

    assert stream(split, INLINE, arrival) != stream(split, PLANS[2], arrival)


def test_a_lost_position_would_be_noticed(split):
    """The negative control of resumption: an epoch that starts at its beginning instead."""
    with Loader(split, TrainPixels(split, AUGMENT, 32, 0), 32, 48, INLINE, shuffle_seed=0) as loader:
        at_two, at_nought = (next(loader.batches(1, start)) for start in (2, 0))
    assert not torch.equal(at_two.images_BHWC, at_nought.images_BHWC)


@pytest.mark.parametrize("plan", [INLINE, PLANS[1]])
def test_an_epoch_can_start_at_any_batch(split, plan):
    with Loader(split, TrainPixels(split, AUGMENT, 32, 0), 32, 48, plan, shuffle_seed=0) as loader:
        whole = list(loader.batches(1))
        assert len(whole) == loader.num_batches == len(split) // 48
        for start in range(len(whole)):
            rest = list(loader.batches(1, start))
            assert len(rest) == len(whole) - start
            assert all(torch.equal(a.images_BHWC, b.images_BHWC) for a, b in zip(rest, whole[start:]))


def test_an_abandoned_epoch_leaves_no_work_behind(split):
    with Loader(split, TrainPixels(split, AUGMENT, 32, 0), 32, 48, PLANS[2], shuffle_seed=0) as loader:
        next(loader.batches(1))
        assert sum(1 for _ in loader.batches(2)) == loader.num_batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowmem-loader")]


def test_orders_differ_between_epochs_and_seeds():
    assert not np.array_equal(train_order(0, 1, 50), train_order(0, 2, 50))
    assert not np.array_equal(train_order(0, 1, 50), train_order(1, 1, 50))
    assert sorted(train_order(0, 1, 50)) == list(range(50))


def test_evaluation_keeps_the_order_and_the_last_batch(split):
    with Loader(split, EvalPixels(split, 32, 1.0), 32, 48, PLANS[1]) as loader:
        batches = list(loader.batches())
    assert torch.cat([batch.indices_B for batch in batches]).tolist() == list(range(len(split)))
    assert loader.num_batches == len(batches)


def test_a_file_that_disappears_is_named(split):
    def pixels(epoch, index):
        raise FileNotFoundError("gone")

    with (
        Loader(split, pixels, 32, 48, PLANS[1], shuffle_seed=0) as loader,
        pytest.raises(LowmemError, match="can no longer be read"),
    ):
        list(loader.batches(1))


def test_mixup_is_drawn_by_step_and_only_as_often_as_the_recipe_says():
    recipe = MixupRecipe(prob=0.5, alpha=1.3)
    drawn = [draw_mixup(recipe, 0, 1, step, 8) for step in range(400)]
    assert 160 < sum(draw is not None for draw in drawn) < 240
    again = draw_mixup(recipe, 0, 1, 399, 8) if drawn[399] else draw_mixup(recipe, 0, 1, 398, 8)
    twin = drawn[399] or drawn[398]
    assert again is None and twin is None or again.lam == twin.lam and np.array_equal(again.partner_B, twin.partner_B)
    assert draw_mixup(MixupRecipe(), 0, 1, 0, 8) is None


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_device_input_normalises_and_mixes(split, memory_format):
    norm = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with Loader(split, EvalPixels(split, 32, 1.0), 32, 8, INLINE) as loader:
        batch = next(loader.batches())
    mixing = DeviceInput(norm, torch.device("cpu"), memory_format, MixupRecipe(prob=1.0), seed=3)
    plain_BCHW = mixing.images(batch.images_BHWC)
    mean, std = torch.tensor(norm.mean).view(1, 3, 1, 1), torch.tensor(norm.std).view(1, 3, 1, 1)
    expected_BCHW = (batch.images_BHWC.permute(0, 3, 1, 2).float() / 255 - mean) / std
    assert torch.allclose(plain_BCHW, expected_BCHW, atol=1e-5)
    assert plain_BCHW.is_contiguous(
        memory_format=torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    )
    mixed, draw = mixing.prepare(batch, 1, 0), draw_mixup(MixupRecipe(prob=1.0), 3, 1, 0, 8)
    assert torch.allclose(
        mixed.images_BCHW, draw.lam * plain_BCHW + (1 - draw.lam) * plain_BCHW[draw.partner_B], atol=1e-5
    )
    assert torch.equal(mixed.targets.partner_labels_B, batch.labels_B[draw.partner_B]) and mixed.targets.lam == draw.lam


@pytest.mark.cuda
def test_on_a_card_many_batches_in_flight_arrive_whole(split):
    """The copies run beside a busy main stream; each batch is what the CPU makes of it."""
    card, norm, recipe = torch.device("cuda:0"), Normalisation((0.5,) * 3, (0.2,) * 3), MixupRecipe(prob=0.5)
    plan = LoaderPlan(kind="processes", workers=2, prefetch_batches=3, pin_memory=True)
    on_card, on_cpu = (DeviceInput(norm, device, "channels_last", recipe, 3) for device in (card, torch.device("cpu")))
    busy = torch.randn(2048, 2048, device=card)
    made, expected = [], []
    with Loader(split, TrainPixels(split, AUGMENT, 64, 0), 64, 48, plan, shuffle_seed=0) as loader:
        for step, batch in enumerate(loader.batches(1)):
            busy = (busy @ busy).clamp(-1, 1)
            made.append(on_card.prepare(batch, 1, step).images_BCHW.mean((2, 3)))
            expected.append(on_cpu.prepare(batch, 1, step).images_BCHW.mean((2, 3)))
    assert all(torch.allclose(a.cpu(), b, atol=1e-4) for a, b in zip(made, expected))
