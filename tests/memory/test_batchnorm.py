"""Statistics survive recomputation, do not depend on the order of the atoms, and can be taken back."""

from itertools import permutations

import pytest
import torch
from memory_helpers import differing, end_state, make_plan, make_recipe, policies, relative_difference
from timm.layers.evo_norm import EvoNorm2dB0
from torch import Tensor, nn

from lowmem.memory.activations import apply_policies
from lowmem.memory.batchnorm import AtomStatistics, StatisticsBackup, has_live_batchnorm, recomputing
from lowmem.planning.plan import BlockPolicy


def _atoms() -> list[Tensor]:
    """Four atoms of unequal mean and spread."""
    random = torch.Generator().manual_seed(0)
    return [k + (1 + k) * torch.randn(6, 3, 5, 5, generator=random) for k in range(4)]


def _after(order: tuple[int, ...], shared: bool) -> nn.BatchNorm2d:
    norm, atoms = nn.BatchNorm2d(3), _atoms()
    statistics = AtomStatistics(norm, len(order))
    for position, atom in enumerate(order):
        if shared:
            statistics.begin_atom(position)
        norm(atoms[atom])
    statistics.end_step()
    return norm


def test_statistics_do_not_depend_on_the_order_of_the_atoms() -> None:
    means = torch.stack([atom.mean((0, 2, 3)) for atom in _atoms()])
    variances = torch.stack([atom.var((0, 2, 3)) for atom in _atoms()])
    for order in permutations(range(4)):
        norm = _after(order, shared=True)
        torch.testing.assert_close(norm.running_mean, 0.1 * means.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances.mean(0), rtol=1e-5, atol=1e-6)
        assert norm.momentum == 0.1


def test_plain_momentum_depends_on_the_order() -> None:
    found = torch.stack([_after(order, shared=False).running_mean for order in permutations(range(4))])
    assert float(found.std(0).min()) > 1e-2


def test_one_atom_is_left_alone() -> None:
    plain = nn.BatchNorm2d(3)
    plain(_atoms()[1])
    assert not differing(dict(plain.state_dict()), dict(_after((1,), shared=True).state_dict()))


def test_cumulative_averages_are_left_alone() -> None:
    norm = nn.BatchNorm2d(3, momentum=None)
    AtomStatistics(norm, 4).begin_atom(2)
    assert norm.momentum is None
    with recomputing([norm]):
        norm(_atoms()[0])
    assert norm.momentum is None
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_an_error_during_recomputation_restores_the_momentum() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="stop"), recomputing([norm]):
        raise ValueError("stop")
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked is not None


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_statistics_of_evonorm_survive(kind: str) -> None:
    x = torch.randn(4, 3, 8, 8)
    buffers = []
    for recompute in (None, kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), EvoNorm2dB0(4), nn.Conv2d(4, 4, 1)))
        if recompute:
            apply_policies(model, {"1": BlockPolicy(recompute=recompute)})
        model(x).square().sum().backward()
        buffers.append(dict(model.state_dict()))
    assert not differing(*buffers)
    assert not torch.equal(buffers[0]["1.1.running_var"], torch.ones(4))


def test_what_looks_across_images() -> None:
    assert has_live_batchnorm(nn.BatchNorm2d(3))
    assert not has_live_batchnorm(nn.BatchNorm2d(3).eval())
    assert has_live_batchnorm(nn.BatchNorm2d(3, track_running_stats=False).eval())
    assert has_live_batchnorm(EvoNorm2dB0(3))
    assert not has_live_batchnorm(
        nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, track_running_stats=True))
    )


def test_backup_restores_every_bit() -> None:
    norm = nn.BatchNorm2d(3)
    norm(_atoms()[0])
    backup = StatisticsBackup(norm)
    norm(_atoms()[1])
    backup.take()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm(_atoms()[2])
    assert differing(before, dict(norm.state_dict()))
    backup.restore()
    assert not differing(before, dict(norm.state_dict()))


@pytest.mark.parametrize("kind", ["full", "selective_offload"])
def test_frozen_statistics_stay_and_policies_are_bitwise(kind: str) -> None:
    recipe = make_recipe("test_resnet", freeze=True)
    expected = end_state(recipe, make_plan())
    assert torch.equal(expected["bn1.running_mean"], torch.zeros_like(expected["bn1.running_mean"]))
    assert not differing(expected, end_state(recipe, make_plan(blocks=policies("test_resnet", kind))))


def test_accumulation_with_frozen_batch_norm_equals_the_whole_batch() -> None:
    whole = end_state(make_recipe("test_resnet", freeze=True), make_plan(), num_steps=1)
    for norm_batch, micro_batch in ((2, 2), (1, 1), (None, 1), (None, 3)):
        recipe = make_recipe("test_resnet", freeze=True, norm_batch=norm_batch)
        parts = end_state(recipe, make_plan(micro_batch=micro_batch), num_steps=1)
        assert relative_difference(whole, parts) < 1e-5


def test_accumulation_with_live_batch_norm_is_another_step() -> None:
    whole = end_state(make_recipe("test_resnet"), make_plan(), num_steps=1)
    parts = end_state(make_recipe("test_resnet", norm_batch=2), make_plan(micro_batch=2), num_steps=1)
    assert relative_difference(whole, parts) > 0.1
