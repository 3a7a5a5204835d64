"""Memory runs out in the forward pass, in recomputation, in the backward pass, in the optimizer: the step is taken back, exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_helpers import differing, end_state, make_engine, make_plan, make_recipe, policies, run_steps, state_of
from torch import Tensor, nn

from lowmem.memory.limit import CountedLimit, CudaLimit, enforce, is_out_of_memory
from lowmem.memory.meter import MemoryMeter
from lowmem.planning.plan import Budget
from lowmem.training.engine import Engine, OutOfBudgetError

HUGE = 2**28
BUDGET = Budget(total_bytes=2**27)
KINDS = ("none", "full", "dropped", "offload", "selective_offload")


def _huge_in_call(engine: Engine, call: int) -> None:
    """The third block asks for far too much in its `call`-th run of the next step."""
    block = engine.model.get_submodule("layer3.0.conv2")
    counter = [0]

    def ask(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counter[0] += 1
        if counter[0] == call:
            args[0].new_empty(HUGE)

    block.register_forward_pre_hook(ask)


def _in_forward(engine: Engine) -> None:
    _huge_in_call(engine, 1)


def _in_second_atom(engine: Engine) -> None:
    _huge_in_call(engine, 2 if not engine.plan.blocks or engine.plan.blocks["layer3.0"].recompute == "none" else 3)


def _in_recomputation(engine: Engine) -> None:
    _huge_in_call(engine, 2)


def _in_backward(engine: Engine) -> None:
    _on_gradient(engine, lambda grad: grad.new_empty(HUGE))


def _on_gradient(engine: Engine, ask: Callable[[Tensor], object]) -> None:
    """Call `ask` with the gradient of an activation. Not of a weight: an error in a hook there leaves torch with a graph that is
    never freed."""

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        def hook(grad: Tensor) -> None:
            ask(grad)

        output.register_hook(hook)

    engine.model.get_submodule("layer2.0.conv1").register_forward_hook(watch)


def _in_optimizer(engine: Engine) -> None:
    inner = engine.optimizer.optimizer if engine.plan.optimizer == "device" else None
    assert inner is not None
    inner.register_step_pre_hook(lambda *_: torch.empty(HUGE))


def _fails_and_is_taken_back(engine: Engine, inject: Callable[[Engine], None]) -> None:
    run_steps(engine, [0])
    before = state_of(engine)
    inject(engine)
    with pytest.raises(OutOfBudgetError, match="out of memory") as caught:
        run_steps(engine, [1])
    assert caught.value.rolled_back
    assert not differing(before, state_of(engine))
    assert all(parameter.grad is None for parameter in engine.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inject", [_in_forward, _in_second_atom, _in_backward, _in_optimizer])
def test_a_failed_step_leaves_no_trace(kind: str, inject: Callable[[Engine], None]) -> None:
    plan = make_plan(micro_batch=2, blocks=policies("test_resnet", kind), budget=BUDGET)
    engine = make_engine(make_recipe("test_resnet", norm_batch=2), plan)
    _fails_and_is_taken_back(engine, inject)
    engine.close()


@pytest.mark.parametrize("kind", ["full", "dropped"])
def test_a_failed_recomputation_leaves_no_trace(kind: str) -> None:
    engine = make_engine(make_recipe("test_resnet"), make_plan(blocks=policies("test_resnet", kind), budget=BUDGET))
    _fails_and_is_taken_back(engine, _in_recomputation)
    momenta = {module.momentum for module in engine.model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert momenta == {0.1}
    engine.close()


def test_after_the_failure_a_leaner_plan_ends_where_the_rich_one_would_have() -> None:
    recipe = make_recipe("test_resnet", dropout=0.2, drop_path=0.2)
    engine = make_engine(recipe, make_plan(blocks=policies("test_resnet", "offload"), budget=BUDGET))
    run_steps(engine, [0])
    _in_backward_once(engine)
    with pytest.raises(OutOfBudgetError):
        run_steps(engine, [1])
    engine.adopt(make_plan(blocks=policies("test_resnet", "full"), optimizer="backward"))
    run_steps(engine, [1, 2])
    assert not differing(end_state(recipe, make_plan(), num_steps=3), state_of(engine))


def _in_backward_once(engine: Engine) -> None:
    asked: list[int] = []

    def ask(grad: Tensor) -> None:
        if not asked:
            asked.append(1)
            grad.new_empty(HUGE)

    _on_gradient(engine, ask)


def test_the_same_plan_goes_on_after_a_failure() -> None:
    recipe = make_recipe("test_resnet", norm_batch=2)
    engine = make_engine(
        recipe, make_plan(micro_batch=2, blocks=policies("test_resnet", "selective_offload"), budget=BUDGET)
    )
    _in_backward_once(engine)
    with pytest.raises(OutOfBudgetError):
        run_steps(engine, [0])
    run_steps(engine, [0, 1])
    assert not differing(end_state(recipe, make_plan(micro_batch=2)), state_of(engine))


def test_an_updating_backward_pass_says_that_it_cannot_be_taken_back() -> None:
    engine = make_engine(make_recipe("test_resnet"), make_plan(optimizer="backward", budget=BUDGET))
    before = state_of(engine)
    _in_backward(engine)
    with pytest.raises(OutOfBudgetError) as caught:
        run_steps(engine, [0])
    assert not caught.value.rolled_back
    assert differing(before, state_of(engine))
    assert not engine.optimizer.armed


def test_an_update_that_fails_half_way_says_that_it_cannot_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.memory.host_optimizer.STAGING_BYTES", 64 * 1024)
    monkeypatch.setattr("lowmem.memory.host_optimizer.CHUNK_ELEMENTS", 8 * 1024)
    engine = make_engine(make_recipe("test_resnet"), make_plan(optimizer="host", budget=BUDGET))
    before, apply, calls = state_of(engine), engine.optimizer._apply, []

    def fails_the_second_time(group: Any, slot: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            torch.empty(HUGE)
        apply(group, slot)

    monkeypatch.setattr(engine.optimizer, "_apply", fails_the_second_time)
    with pytest.raises(OutOfBudgetError) as caught:
        run_steps(engine, [0])
    assert not caught.value.rolled_back and differing(before, state_of(engine))
    engine.close()


def test_a_forward_pass_that_fails_can_be_taken_back_under_any_placement() -> None:
    engine = make_engine(make_recipe("test_resnet"), make_plan(optimizer="backward", budget=BUDGET))
    _fails_and_is_taken_back(engine, _in_forward)
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_measured_peak_is_the_smallest_limit(kind: str) -> None:
    """A budget of exactly the peak is enough; one byte less is not, wherever in the step that shows."""
    recipe, blocks = make_recipe("test_resnet"), policies("test_resnet", kind)
    engine = make_engine(recipe, make_plan(blocks=blocks))
    run_steps(engine, [0])
    peak_bytes = engine.enforcement.peak_bytes
    engine.close()
    engine = make_engine(recipe, make_plan(blocks=blocks, budget=Budget(total_bytes=peak_bytes)))
    run_steps(engine, [0])
    engine.close()
    engine = make_engine(recipe, make_plan(blocks=blocks, budget=Budget(total_bytes=peak_bytes - 1)))
    before = state_of(engine)
    with pytest.raises(OutOfBudgetError):
        run_steps(engine, [0])
    assert not differing(before, state_of(engine))


def test_other_errors_are_not_mistaken_for_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    engine = make_engine(make_recipe("test_resnet"), make_plan(budget=BUDGET))
    with pytest.raises(RuntimeError, match="expected input"):
        engine.step.model(torch.ones(1, 5, 48, 48))


def test_counting_stops_after_a_few_runs_of_each_kind() -> None:
    limit = enforce(torch.device("cpu"), Budget(total_bytes=1000), dict)
    assert isinstance(limit, CountedLimit)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError), limit.watch("training"):
            torch.empty(1000)
    with limit.watch("training"):
        torch.empty(1000)
    with pytest.raises(torch.OutOfMemoryError), limit.watch("evaluation"):
        torch.empty(100)
        torch.empty(1000)
    assert limit.peak_bytes == 400, "the peak is what was granted"


def test_nothing_of_a_failed_step_stays_alive() -> None:
    engine = make_engine(
        make_recipe("test_resnet"), make_plan(blocks=policies("test_resnet", "dropped"), budget=BUDGET)
    )
    with MemoryMeter() as meter:
        run_steps(engine, [0])
        resident_bytes = meter.live_bytes
        _in_backward(engine)
        with pytest.raises(OutOfBudgetError):
            run_steps(engine, [0])
        assert meter.peak_bytes > HUGE
        assert meter.live_bytes <= resident_bytes


@pytest.mark.cuda
def test_the_allocator_holds_the_limit_and_the_step_is_taken_back() -> None:
    recipe = make_recipe("test_resnet", size=32, px=224)
    engine = make_engine(recipe, make_plan(device="cuda:0", micro_batch=32))
    run_steps(engine, [0])
    engine.close()
    limit_bytes = 64 * 2**20
    engine = make_engine(recipe, make_plan(device="cuda:0", micro_batch=32, budget=Budget(total_bytes=limit_bytes)))
    assert isinstance(engine.enforcement, CudaLimit)
    before = state_of(engine)
    with pytest.raises(OutOfBudgetError, match="out of memory"):
        run_steps(engine, [0])
    assert not differing(before, state_of(engine))
    assert torch.cuda.max_memory_reserved() >= torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() <= limit_bytes
    engine.close()
    torch.cuda.set_per_process_memory_fraction(1.0)
