"""The plan decides the cost, the recipe the classifier: whole runs, compared bit for bit."""

import itertools

import pytest
import torch

from lowmem.data.batch import DeviceBatch, Targets
from lowmem.memory.activations import apply_policies
from lowmem.memory.optimizer import place_optimizer
from lowmem.planning.plan import BlockPolicy, Plan
from lowmem.recipe import Recipe
from lowmem.training.model import build_model, freeze_batchnorm
from lowmem.training.objective import Objective
from lowmem.training.step import TrainStep, micro_batches
from tests.training.conftest import INLINE, THREADS, classifier, last_state

BLOCKS = ("layer1.0", "layer2.0", "layer3.0", "layer4.0")


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_recomputation_offload_workers_and_placement_give_the_same_classifier(train_run):
    plain = train_run("plain")
    plans = {
        "full": {"blocks": dict.fromkeys(BLOCKS, BlockPolicy(recompute="full"))},
        "selective": {"blocks": dict.fromkeys(BLOCKS, BlockPolicy(recompute="selective", keep=(0,)))},
        "offload": {"blocks": dict.fromkeys(BLOCKS, BlockPolicy(host="all"))},
        "workers": {"loader": THREADS},
        "backward": {"optimizer": "backward"},
        "host": {"optimizer": "host"},
    }
    for name, changes in plans.items():
        run = train_run(name, **changes)
        assert differing(last_state(plain), last_state(run)) == [], name
        assert differing(classifier(plain), classifier(run)) == [], name


def test_another_seed_gives_another_classifier(train_run):
    assert differing(last_state(train_run("a")), last_state(train_run("b", "seed=1")))


# One step in double precision, so that rounding is far below any effect.


def one_step(
    order=None, micro_batch=8, norm_batch=None, frozen=False, plain_momentum=False, model="test_resnet", dropout=0.0
):
    """State after two steps of batch 8, with the atoms of each in the given order."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": model, "weights": "none", "dropout": dropout, "freeze_batchnorm": frozen},
            "batch": {"size": 8, "norm_batch": norm_batch},
            "loss": {"class_weights": "reciprocal"},
        }
    )
    torch.manual_seed(0)
    net = build_model(recipe.model, 3).double().train()
    if frozen:
        freeze_batchnorm(net)
    plan = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=micro_batch)
    handle, optimizer = apply_policies(net, {}), place_optimizer(net, recipe.optimizer, "device", torch.device("cpu"))
    objective = Objective(recipe.loss, torch.tensor([5, 2, 9]), "cpu")
    step = TrainStep(net, recipe, plan, objective, optimizer, handle)
    if plain_momentum:
        step.statistics.momenta = []
    random = torch.Generator().manual_seed(1)
    for number in range(2):
        images_BCHW = torch.randn(8, 3, 64, 64, generator=random, dtype=torch.float64) * torch.arange(1, 9).view(
            8, 1, 1, 1
        )
        labels_B = torch.randint(0, 3, (8,), generator=random)
        if order is not None:
            size = recipe.batch.atom
            rows = torch.cat([torch.arange(atom * size, (atom + 1) * size) for atom in order])
            images_BCHW, labels_B = images_BCHW[rows], labels_B[rows]
        step(DeviceBatch(images_BCHW, Targets(labels_B)), 1, number)
    return net.state_dict()


def furthest(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_atoms_in_any_order_end_with_the_same_weights_and_statistics():
    reference = one_step(order=(0, 1, 2, 3), norm_batch=2, micro_batch=2)
    for order in list(itertools.permutations(range(4)))[1::5]:
        assert furthest(reference, one_step(order=order, norm_batch=2, micro_batch=2)) < 1e-6


def test_plain_momentum_would_depend_on_the_order():
    a = one_step(order=(0, 1, 2, 3), norm_batch=2, micro_batch=2, plain_momentum=True)
    b = one_step(order=(3, 2, 1, 0), norm_batch=2, micro_batch=2, plain_momentum=True)
    assert furthest(a, b) > 1e-2


def test_with_frozen_batch_norm_accumulation_equals_the_whole_batch():
    assert furthest(one_step(frozen=True), one_step(frozen=True, norm_batch=2, micro_batch=2)) < 1e-6


def test_with_live_batch_norm_it_does_not():
    assert furthest(one_step(), one_step(norm_batch=2, micro_batch=2)) > 1e-3


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_network_without_batch_norm_may_be_split_anywhere_even_with_dropout(micro_batch):
    whole = one_step(model="test_vit", dropout=0.3)
    assert furthest(whole, one_step(model="test_vit", dropout=0.3, micro_batch=micro_batch)) < 1e-6


def test_micro_batches_never_cross_an_atom():
    parts = micro_batches(12, 6, 4)
    assert [(part.atom, part.start, part.stop) for part in parts] == [(0, 0, 4), (0, 4, 6), (1, 6, 10), (1, 10, 12)]
    assert INLINE.workers == 0
