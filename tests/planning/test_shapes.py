"""Shapes without memory: what ShapeMode says of an operation is what running it gives, and what FakeTensorMode says of a whole step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.planning.known import Planning
from lowmem.planning.network import FakeNetwork
from lowmem.planning.shapes import ShapeMode
from lowmem.planning.trace import trace_step
from tests.planning.conftest import CLASSES, planning_for, small_recipe


def description(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes()


OPERATIONS = {
    "convolution": lambda x: F.conv2d(x, torch.ones(6, 2, 3, 3), groups=2),
    "convolution, channels last": lambda x: F.conv2d(x.to(memory_format=torch.channels_last), torch.ones(6, 4, 1, 1)),
    "transposed convolution": lambda x: F.conv_transpose2d(x, torch.ones(4, 6, 2, 2), stride=2),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
    "layer norm": lambda x: F.layer_norm(x, (8, 8)),
    "pool": lambda x: F.max_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "in place": lambda x: F.relu(x, inplace=True),
    "view": lambda x: x.flatten(2).transpose(1, 2),
    "reshaped copy": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4),
    "type promotion": lambda x: x * torch.ones(1, dtype=torch.float64),
    "integer": lambda x: x.argmax(1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "concatenation": lambda x: torch.cat([x, x], 1),
    "index": lambda x: x[:, torch.tensor([0, 2])],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "interpolation": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "empty": lambda x: x[:0] + 1,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_shape_that_running_it_gives(name: str) -> None:
    real = OPERATIONS[name](torch.randn(2, 4, 8, 8))
    with ShapeMode():
        assert description(OPERATIONS[name](torch.empty(2, 4, 8, 8))) == description(real)


def test_nothing_is_computed_or_written() -> None:
    weight = torch.ones(3)
    with ShapeMode():
        weight.mul_(7)
        total = torch.full((4,), 3.0) + 1
    assert torch.equal(weight, torch.ones(3)) and torch.equal(total, torch.zeros(4))


def test_scalars_of_other_types_stay_apart() -> None:
    with ShapeMode():
        whole = torch.ones(2, dtype=torch.int64)
        assert [(whole + other).dtype for other in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]


def test_a_value_that_is_needed_is_an_error_and_not_a_guess() -> None:
    with ShapeMode(), pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3).nonzero().item()


def test_gradients_have_the_shapes_and_layouts_of_a_real_backward_pass() -> None:
    def gradients() -> list[tuple[object, ...]]:
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1))
        net = net.to(memory_format=torch.channels_last)
        x = torch.empty(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        net(x).square().mean().backward()
        return [description(t.grad) for t in (x, *net.parameters()) if t.grad is not None]

    real = gradients()
    with ShapeMode():
        assert gradients() == real
    assert len(real) == 7


@pytest.mark.parametrize("name", ["resnet26d", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"])
@pytest.mark.parametrize("amp", ["bf16", "fp32"])
def test_a_whole_step_has_the_peak_that_fake_tensors_give(name: str, amp: str, cpu) -> None:
    recipe = small_recipe(name, px=224 if "vit" in name else 64, batch=2, amp=amp)
    planning = planning_for(recipe, cpu)
    plan = planning.base_plan(2)
    assert abs(fake_peak(planning, plan) / planning.trace(plan).peak_bytes - 1) < 1e-3


def fake_peak(planning: Planning, plan) -> int:
    """The same step under FakeTensorMode."""
    network = FakeNetwork(planning.recipe, CLASSES, mode=FakeTensorMode(allow_non_fake_inputs=True))
    return trace_step(network, plan, planning.recipe).peak_bytes
