"""Masks are the same whatever the policy, and a split atom sees the rows of the whole atom's masks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from memory_helpers import differing, end_state, make_plan, make_recipe, policies, relative_difference
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem.errors import LowmemError
from lowmem.memory.dropout import atom_masks, draws_random_numbers
from lowmem.training.model import build_model


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_masks_are_equal_under_every_policy(name: str) -> None:
    recipe = make_recipe(name, dropout=0.3, drop_path=0.4)
    expected = end_state(recipe, make_plan())
    assert differing(expected, end_state(make_recipe(name), make_plan()))
    for kind in ("full", "dropped", "offload", "selective_offload"):
        assert not differing(expected, end_state(recipe, make_plan(blocks=policies(name, kind)))), kind


def test_a_checkpoint_that_forgets_the_generator_is_seen() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.randn(4, 8, requires_grad=True)
    grads = []
    for forward in (block, partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(forward(x).sum(), x)[0])
    assert not torch.equal(*grads)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
@pytest.mark.parametrize("kind", ["none", "full", "dropped"])
def test_a_split_atom_equals_the_whole(name: str, kind: str) -> None:
    recipe = make_recipe(name, dropout=0.3, drop_path=0.4)
    whole = end_state(recipe, make_plan(), num_steps=1)
    for micro_batch in (1, 3):
        parts = end_state(recipe, make_plan(micro_batch=micro_batch, blocks=policies(name, kind)), num_steps=1)
        assert relative_difference(whole, parts) < 1e-5


def test_without_the_rows_a_split_is_another_step() -> None:
    model = build_model(make_recipe("test_convnext", dropout=0.3, drop_path=0.4).model, 3).train()
    x = torch.randn(4, 3, 48, 48)
    whole = _gradient(model, x, [slice(0, 4)], by_row=True)
    torch.testing.assert_close(
        _gradient(model, x, [slice(0, 1), slice(1, 4)], by_row=True), whole, rtol=1e-3, atol=1e-5
    )
    assert float((_gradient(model, x, [slice(0, 1), slice(1, 4)], by_row=False) - whole).norm() / whole.norm()) > 0.1


def _gradient(model: nn.Module, x: Tensor, parts: list[slice], by_row: bool) -> Tensor:
    model.zero_grad()
    for rows in parts:
        with atom_masks(0, 1, 0, 0, rows if by_row else None, len(x)):
            model(x[rows]).square().sum().backward()
    return model.get_submodule("stem")[0].weight.grad.clone()


def test_masks_depend_on_every_counter() -> None:
    def mask(*counters: int) -> Tensor:
        with atom_masks(*counters):
            return F.dropout(torch.ones(64))

    assert torch.equal(mask(0, 1, 2, 3), mask(0, 1, 2, 3))
    for other in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)):
        assert not torch.equal(mask(0, 1, 2, 3), mask(*other))


def test_rows_of_windows_and_extreme_rates() -> None:
    whole, part = torch.ones(8, 5), torch.ones(2, 5)  # two windows per image, four images
    with atom_masks(0, 1, 0, 0, slice(0, 4), 4):
        expected = F.dropout(whole, 0.5)
    with atom_masks(0, 1, 0, 0, slice(2, 3), 4):
        assert torch.equal(F.dropout(part, 0.5), expected[4:6])
        assert torch.equal(F.dropout(part, 1.0), torch.zeros(2, 5))
        assert F.dropout(part, 0.5, training=False) is part
        assert F.dropout(part, 0.5, inplace=True) is part


def test_what_cannot_be_split_is_refused() -> None:
    x = torch.ones(2, 4, 3, 3)
    for draw in (
        F.dropout2d,
        torch.rand_like,
        F.alpha_dropout,
        lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=0.5),
    ):
        with atom_masks(0, 1, 0, 0, slice(0, 2), 2):
            draw(x)
        with atom_masks(0, 1, 0, 0, slice(0, 2), 4), pytest.raises(LowmemError, match="norm_batch"):
            draw(x.clone()) if draw is not F.alpha_dropout else F.alpha_dropout(x, training=True)
    attention = nn.MultiheadAttention(4, 2, dropout=0.5)
    tokens = torch.ones(3, 2, 4)
    with atom_masks(0, 1, 0, 0, slice(0, 2), 4):
        with pytest.raises(LowmemError, match="multi_head_attention_forward"):
            attention(tokens, tokens, tokens)
        attention.eval()(tokens, tokens, tokens)
    with atom_masks(0, 1, 0, 0, slice(0, 2), 3), pytest.raises(LowmemError, match="cannot be split"):
        F.dropout(torch.ones(5, 2), 0.5)


def test_who_draws() -> None:
    assert draws_random_numbers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert draws_random_numbers(DropPath(0.1))
    assert not draws_random_numbers(nn.Sequential(nn.Dropout(0.0), DropPath(0.0), nn.Linear(2, 2)))
    model = build_model(make_recipe("test_convnext", drop_path=0.4).model, 3)
    assert draws_random_numbers(model)
    assert not draws_random_numbers(build_model(make_recipe("test_convnext").model, 3))
    model.drop_rate = 0.5
    assert draws_random_numbers(model)
