"""Saved tensors that are made again have the same bits, are not there in between, and are made only where that is sound."""

import pytest
import torch
from memory_helpers import BLOCKS, differing, end_state, make_plan, make_recipe
from torch import Tensor, nn

from lowmem.errors import LowmemError
from lowmem.memory import again, saved
from lowmem.memory.activations import apply_policies
from lowmem.memory.meter import MemoryMeter
from lowmem.planning.plan import KEEP_ALL, STEM, BlockPolicy

ALL, ODD, EVEN = tuple(range(64)), tuple(range(1, 64, 2)), tuple(range(0, 64, 2))
POLICIES = (BlockPolicy(again=ALL), BlockPolicy(again=ODD), BlockPolicy(again=EVEN, host=ODD))


@pytest.fixture
def num_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts, made = [0], again.Remade._made

    def counted(self: again.Remade) -> Tensor:
        counts[0] += 1
        return made(self)

    monkeypatch.setattr(again.Remade, "_made", counted)
    return counts


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_and_stem_are_bitwise(name: str, amp: str, num_made: list[int]) -> None:
    recipe = make_recipe(name)
    expected = end_state(recipe, make_plan(amp_dtype=amp))
    for policy in POLICIES:
        for paths in (BLOCKS[name], (STEM, *BLOCKS[name]), (STEM,)):
            blocks = dict.fromkeys(BLOCKS[name], KEEP_ALL) | dict.fromkeys(paths, policy)
            assert not differing(expected, end_state(recipe, make_plan(amp_dtype=amp, blocks=blocks))), (policy, paths)
    assert num_made[0] > 10


def test_accumulation_and_frozen_statistics_are_bitwise(num_made: list[int]) -> None:
    for recipe in (make_recipe("test_resnet", norm_batch=2), make_recipe("test_resnet", freeze=True)):
        blocks = dict.fromkeys((STEM, *BLOCKS["test_resnet"]), POLICIES[0])
        plan = make_plan(micro_batch=recipe.batch.atom)
        assert not differing(end_state(recipe, plan), end_state(recipe, plan.model_copy(update={"blocks": blocks})))
    assert num_made[0] > 10


def test_a_batch_norm_that_counts_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without momentum 0 the statistics of every batch norm that runs again differ."""
    recipe, blocks = make_recipe("test_resnet"), dict.fromkeys(BLOCKS["test_resnet"], POLICIES[0])
    expected = end_state(recipe, make_plan())
    monkeypatch.setattr(again, "_repeatable", lambda func, args: args)
    names = differing(expected, end_state(recipe, make_plan(blocks=blocks)))
    assert names and all("running" in name for name in names if not name.startswith("exp"))


class _Layers(nn.Module):
    """Convolution, batch norm, ReLU in place, convolution: saves 2 tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu_())


def test_what_is_made_again_is_not_held() -> None:
    num_bytes, held = 4 * 8 * 32 * 32 * 4, []
    for numbers in ((), (1,), (1, 2)):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), _Layers(), nn.AvgPool2d(32)).train()
        apply_policies(model, {"1": BlockPolicy(again=numbers)})
        with MemoryMeter() as meter:
            y = model(torch.ones(4, 3, 32, 32))
            held.append(meter.live_bytes)
            y.sum().backward()
    assert held[0] - held[1] == pytest.approx(num_bytes, abs=1024)
    assert held[0] - held[2] == pytest.approx(2 * num_bytes, abs=1024)


def test_what_draws_random_numbers_is_not_made_again() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.rand_like(x)).exp().exp()

    tensors, module = saved.SavedTensors(nn.Module(), BlockPolicy(again=ALL), None), Random()
    x = torch.ones(2, 512, requires_grad=True)
    with tensors.watching():
        y = module(x)
    assert len(tensors.ordinals) == 3 and not tensors.remade
    y.sum().backward()


def test_an_argument_that_was_changed_in_place_is_refused() -> None:
    tensors = saved.SavedTensors(nn.Module(), BlockPolicy(again=(2,)), None)
    x = torch.ones(2, 512, requires_grad=True)
    with tensors.watching():
        base = x * 1
        y = base * x + torch.relu(base)
        base.add_(1)
    assert len(tensors.remade) == 1
    with pytest.raises(LowmemError, match="changed in place"):
        y.sum().backward()


def test_a_view_changed_in_place_is_not_taken_for_the_whole() -> None:
    """The channels of a convolution's output, seen in another shape, get a bias in place."""

    def loss(x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(x, torch.ones(4, 4, 1, 1))
        y.view(2, 64, 16).add_(torch.arange(16.0))
        return (torch.relu(y) * x).sum() + (y * y).sum()

    grads = []
    for numbers in ((), ALL):
        x = torch.linspace(-1, 1, 2 * 4 * 256).view(2, 4, 16, 16).requires_grad_()
        tensors = saved.SavedTensors(nn.Module(), BlockPolicy(again=numbers), None)
        with tensors.watching():
            total = loss(x)
        total.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
