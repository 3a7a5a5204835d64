"""Offloaded tensors leave the device, come back bit for bit, and their host buffers are used again."""

import pytest
import torch
from memory_helpers import (
    BLOCKS,
    differing,
    end_state,
    make_engine,
    make_plan,
    make_recipe,
    policies,
    run_steps,
    state_of,
)
from torch import nn

from lowmem.errors import LowmemError
from lowmem.memory.activations import apply_policies
from lowmem.memory.meter import MemoryMeter
from lowmem.memory.offload import HostStore
from lowmem.planning.plan import BlockPolicy

CPU = torch.device("cpu")


def test_a_tensor_leaves_and_comes_back() -> None:
    store = HostStore(CPU)
    with MemoryMeter() as meter:
        x = torch.arange(6.0).view(2, 3).t()
        expected = x.clone()
        store.begin_block()
        ticket = store.put(x)
        assert store.put(x) is ticket  # travels once
        del x
        assert meter.live_bytes == 2 * 24  # held until the copy is done
        store.end_forward()
        assert meter.live_bytes == 24
        first, second = store.get(ticket), store.get(ticket)
        assert first is second
        assert torch.equal(first, expected)
        assert first.stride() == (1, 3)
        del first, second
        assert meter.live_bytes == 24
    assert store.host_bytes == 24


def test_a_block_is_released_when_the_second_after_it_begins() -> None:
    store = HostStore(CPU)
    with MemoryMeter() as meter:
        for held in (1, 2, 2, 2):
            store.begin_block()
            store.put(torch.zeros(256))
            assert meter.live_bytes == held * 1024
        store.end_forward()
        assert meter.live_bytes == 0
    assert store.host_bytes == 4096


def test_backward_fetches_the_block_before_ahead() -> None:
    store = HostStore(CPU)
    tickets = []
    for k in range(3):
        store.begin_block()
        tickets.append(store.put(torch.full((256,), float(k))))
    store.end_forward()
    store.get(tickets[2])
    assert tickets[1].device_copy is not None
    assert tickets[0].device_copy is None
    assert float(store.get(tickets[1])[0]) == 1.0
    assert tickets[0].device_copy is not None


def test_a_tensor_of_two_blocks_does_not_stop_the_fetching() -> None:
    store = HostStore(CPU)
    shared = torch.ones(256)
    store.begin_block()
    first = store.put(shared)
    store.begin_block()
    second = store.put(torch.zeros(256))
    assert store.put(shared) is first
    store.end_forward()
    assert torch.equal(store.get(first), shared)
    assert second.device_copy is not None
    store.get(second)
    assert torch.equal(store.get(first), shared)


@pytest.mark.parametrize("kind", ["offload", "selective_offload"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_buffers_are_allocated_once(name: str, kind: str) -> None:
    engine = make_engine(make_recipe(name, norm_batch=2), make_plan(micro_batch=2, blocks=policies(name, kind)))
    run_steps(engine, [0])
    store = engine.policies.store
    assert store is not None
    after_one, addresses = store.host_bytes, _addresses(store)
    assert after_one > 10_000
    assert after_one == sum(
        buffer.nbytes for buffers in store.free.values() for buffer in buffers
    )  # all of them are back
    run_steps(engine, [1, 2])
    assert store.host_bytes == after_one
    assert _addresses(store) == addresses
    engine.close()


def _addresses(store: HostStore) -> set[int]:
    return {buffer.data_ptr() for buffers in store.free.values() for buffer in buffers}


def test_a_pass_without_backward_gives_its_buffers_back() -> None:
    store = HostStore(CPU)
    store.begin_block()
    store.put(torch.zeros(256))
    store.reset()
    store.begin_block()
    store.put(torch.zeros(256))
    store.end_backward()
    assert store.host_bytes == 1024


def test_what_offload_says_is_freed() -> None:
    """Saved by the block: relu's output, 4 x 8 x 32 x 32 floats, and the block's input of the same size."""
    saved_bytes = 4 * 8 * 32 * 32 * 4
    held = []
    for host in ("none", "all", (1,)):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), nn.AvgPool2d(32)
        )
        handle = apply_policies(model, {"1": BlockPolicy(host=host)})
        with MemoryMeter() as meter:
            y = model(torch.ones(4, 3, 32, 32))
            handle.end_forward()
            held.append(meter.live_bytes)
            y.sum().backward()
    assert held[0] - held[1] == 2 * saved_bytes
    assert held[0] - held[2] == saved_bytes


def test_a_tensor_changed_on_its_way_is_refused() -> None:
    store = HostStore(CPU)
    store.begin_block()
    x = torch.zeros(256)
    store.put(x)
    x.add_(1)
    with pytest.raises(LowmemError, match="in place"):
        store.end_forward()


def test_overlapping_and_partial_tensors_stay_on_the_device() -> None:
    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x[0].expand(2, 512), x[1:], x)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return sum(float(tensor.sum()) for tensor in ctx.saved_tensors) * grad.expand(2, 512)

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Saves.apply(x * 1)

    block = nn.Sequential(Block())
    handle = apply_policies(nn.Sequential(block, nn.Linear(1, 1)), {"0": BlockPolicy(host="all")})
    x = torch.ones(2, 512, requires_grad=True)
    block(x).backward()
    assert float(x.grad[0, 0]) == 1024 + 512 + 1024
    assert handle.store is not None
    assert handle.store.host_bytes == 4096


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["offload", "selective_offload"])
def test_offload_is_bitwise_a_hundred_times(kind: str) -> None:
    recipe = make_recipe("test_resnet", size=16, px=96)
    plan = make_plan(device="cuda:0", micro_batch=16)
    torch.backends.cudnn.deterministic = True
    expected = end_state(recipe, plan, num_steps=100)
    assert not differing(expected, end_state(recipe, plan, num_steps=100)), "the reference itself is not reproducible"
    engine = make_engine(recipe, plan.model_copy(update={"blocks": policies("test_resnet", kind)}))
    run_steps(engine, range(100))
    assert engine.policies.store is not None
    assert engine.policies.store.host_bytes > 0
    assert not differing(expected, state_of(engine))


@pytest.mark.cuda
def test_offload_frees_device_memory() -> None:
    held = {}
    for kind in ("none", "offload"):
        plan = make_plan(device="cuda:0", micro_batch=16, blocks=policies("test_resnet", kind))
        engine = make_engine(make_recipe("test_resnet", size=16, px=160), plan)
        run_steps(engine, [0])
        torch.cuda.reset_peak_memory_stats()
        run_steps(engine, [1])
        held[kind] = torch.cuda.max_memory_allocated()
        engine.close()
    assert held["offload"] < held["none"]
    assert len(BLOCKS["test_resnet"]) == 4


def test_what_one_block_offloads_is_released_while_the_others_run() -> None:
    """Where all blocks are named, each tells the store when it begins; where one is, nobody does until the forward pass ends."""
    alone = {"layer1.0": BlockPolicy(host="all")}
    announced = dict.fromkeys(BLOCKS["test_resnet"], BlockPolicy()) | alone
    recompute = dict.fromkeys(BLOCKS["test_resnet"], BlockPolicy(recompute="full")) | alone
    live, states = [], []
    for blocks in ({}, alone, announced, recompute):
        engine = make_engine(make_recipe("test_resnet", px=160), make_plan(blocks=blocks))
        with MemoryMeter() as meter:
            engine.model.get_submodule("layer4.0").register_forward_pre_hook(lambda *_: live.append(meter.live_bytes))
            run_steps(engine, [0])
        states.append(state_of(engine))
        engine.close()
    assert live[0] == live[1] > live[2] > live[3]
    assert not any(differing(states[0], state) for state in states[1:])
