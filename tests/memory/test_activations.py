"""Every policy on every block gives the same bits, and what cannot be kept is refused."""

import pytest
import torch
from memory_helpers import (
    BLOCKS,
    differing,
    end_state,
    keepable,
    make_engine,
    make_plan,
    make_recipe,
    policies,
    run_steps,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem.errors import LowmemError
from lowmem.memory.activations import _draws_mask, apply_policies
from lowmem.memory.meter import MemoryMeter
from lowmem.planning.plan import BlockPolicy
from lowmem.training.model import build_model

KINDS = ("full", "selective", "dropped", "offload", "selective_offload")


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_policy_is_bitwise(name: str, amp: str) -> None:
    recipe = make_recipe(name)
    expected = end_state(recipe, make_plan(amp_dtype=amp))
    for kind in KINDS:
        blocks = policies(name, kind)
        assert len(blocks) == len(BLOCKS[name])
        assert not differing(expected, end_state(recipe, make_plan(amp_dtype=amp, blocks=blocks))), kind


def test_another_start_is_seen_as_different() -> None:
    recipe = make_recipe("test_resnet")
    other = recipe.model_copy(update={"seed": 1})
    assert len(differing(end_state(recipe, make_plan()), end_state(other, make_plan()))) > 100


def test_a_mixture_of_policies_with_accumulation_is_bitwise() -> None:
    recipe = make_recipe("test_resnet", norm_batch=2)
    kept = keepable("test_resnet")
    mixture = {
        "layer1.0": BlockPolicy(host="all"),
        "layer2.0": BlockPolicy(recompute="selective", keep=kept["layer2.0"][:1]),
        "layer3.0": BlockPolicy(host=(0, 2)),
        "layer4.0": BlockPolicy(recompute="full"),
    }
    expected = end_state(recipe, make_plan(micro_batch=2))
    assert not differing(expected, end_state(recipe, make_plan(micro_batch=2, blocks=mixture)))


def test_a_naive_checkpoint_counts_every_batch_twice() -> None:
    x = torch.randn(4, 3, 48, 48)
    plain, naive = (build_model(make_recipe("test_resnet").model, 3).train() for _ in range(2))
    naive.load_state_dict(plain.state_dict())
    block = naive.get_submodule("layer2.0")
    original = block.forward
    block.forward = lambda *args: checkpoint(original, *args, use_reentrant=False)
    for model in (plain, naive):
        model(x).square().sum().backward()
    differ = differing(dict(plain.state_dict()), dict(naive.state_dict()))
    assert differ
    assert all(name.startswith("layer2.0") for name in differ)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), naive.parameters()))


def test_names_and_forward_are_as_before() -> None:
    model = build_model(make_recipe("test_resnet").model, 3)
    names = list(model.state_dict())
    handle = apply_policies(model, policies("test_resnet", "full"))
    assert list(model.state_dict()) == names
    handle.remove()
    assert "forward" not in model.get_submodule("layer1.0").__dict__


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(LowmemError, match=r"layer9\.0"):
        apply_policies(build_model(make_recipe("test_resnet").model, 3), {"layer9.0": BlockPolicy(recompute="full")})


def test_recomputation_holds_less_and_selective_is_in_between() -> None:
    held = {kind: _held_after_forward(kind) for kind in ("none", "selective", "full", "offload")}
    assert held["full"] < held["selective"] < held["none"]
    assert held["offload"] < held["none"]


def _held_after_forward(kind: str) -> int:
    model = build_model(make_recipe("test_resnet").model, 3).train()
    handle = apply_policies(model, policies("test_resnet", kind))
    x = torch.randn(4, 3, 96, 96)
    with MemoryMeter() as meter:
        y = model(x)
        handle.end_forward()
        del y
        y = model(x)
        handle.end_forward()
        return meter.live_bytes + 0 * len(y)


class _Mutating(nn.Module):
    """Changes the output of its convolution in place, which autograd allows: an addition saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x).add_(1.0))


@pytest.mark.parametrize("host", ["none", "all"])
def test_a_kept_output_that_is_changed_in_place_is_refused(host: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), _Mutating())
    handle = apply_policies(model, {"1": BlockPolicy(recompute="selective", keep=(0,), host=host)})
    with pytest.raises(LowmemError, match="in place"):
        loss = model(torch.randn(2, 3, 64, 64)).sum()
        handle.end_forward()
        loss.backward()


def test_the_same_block_may_recompute_that_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), _Mutating())
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    apply_policies(model, {"1": BlockPolicy(recompute="selective", keep=())})
    model(x).sum().backward()
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(expected, model.parameters()))


def test_attention_with_dropout_in_its_kernel_runs_again() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert _draws_mask(flash, (None, None, None, 0.1), {})
    assert not _draws_mask(flash, (None, None, None), {})
    assert not _draws_mask(torch.ops.aten.mm.default, (None, None), {})


class _Dense(nn.Module):
    """As DenseNet has it: each block takes the list of all features so far, and the caller appends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_DenseBlock(3 + 4 * k) for k in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for block in self.blocks:
            features.append(block(features, scale=x.new_tensor(2.0)))
        return torch.cat(features, 1)


class _DenseBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, features: list[Tensor], scale: Tensor) -> Tensor:
        return self.conv(self.norm(torch.cat(features, 1)).relu() * scale)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_list_that_grows_after_the_block_is_recomputed_as_it_was(recompute: str) -> None:
    x, grads = torch.randn(2, 3, 8, 8), []
    torch.manual_seed(0)
    model = _Dense()
    for policy in ({}, {f"blocks.{k}": BlockPolicy(recompute=recompute) for k in range(3)}):
        apply_policies(model, policy)
        model(x).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert not differing(*grads)


def test_evaluation_keeps_nothing() -> None:
    model = build_model(make_recipe("test_resnet").model, 3).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model(x)
        handle = apply_policies(model, policies("test_resnet", "selective_offload"))
        assert torch.equal(model(x), expected)
    assert handle.store is not None
    assert handle.store.host_bytes == 0


def test_plans_can_be_exchanged_between_steps() -> None:
    recipe = make_recipe("test_resnet")
    engine = make_engine(recipe, make_plan())
    run_steps(engine, [0])
    engine.adopt(make_plan(blocks=policies("test_resnet", "full"), optimizer="host"))
    run_steps(engine, [1])
    engine.adopt(make_plan(blocks=policies("test_resnet", "offload"), optimizer="backward"))
    run_steps(engine, [2])
    found = engine.model_tensors() | engine.optimizer_tensors()
    assert not differing(end_state(recipe, make_plan(), num_steps=3), found)
