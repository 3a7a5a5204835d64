"""Compiled blocks: the same names, the same statistics, the same gradients up to rounding; evaluation runs them as they are."""

import pytest
import torch

from lowmem.data.synthetic import random_batches
from lowmem.errors import LowmemError
from lowmem.memory.compilation import apply_compilation
from lowmem.planning.blocks import find_blocks
from lowmem.planning.execution import Trial, fastest, keep_kernels, refuse_compile
from lowmem.planning.plan import BlockPolicy, Plan
from lowmem.recipe import load_recipe
from lowmem.training import trial
from lowmem.training.model import initialised_model

RECIPE = load_recipe(
    "quickstart",
    ("model.name=test_resnet", "model.weights=none", "model.dropout=0", "data.train_px=64", "batch.size=4", "amp=fp32"),
)
PLAN = Plan(device="cpu", device_name="", amp_dtype="fp32", micro_batch=4, memory_format="contiguous")
MODEL = initialised_model(RECIPE.model, 10, 0)[0]


def gradients(plan: Plan) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Gradients, statistics, and how many blocks were compiled."""
    model = initialised_model(RECIPE.model, 10, 0)[0].train()
    handle = apply_compilation(model, plan, backend="aot_eager")
    num_compiled = len(handle.blocks)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model(images).square().sum().backward()
    names = {name: p.grad for name, p in model.named_parameters()}
    handle.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    return names, {name: b.clone() for name, b in model.named_buffers()}, num_compiled


def test_gradients_and_statistics_are_those_of_plain_blocks() -> None:
    plain, plain_buffers, none = gradients(PLAN)
    compiled, buffers, num_compiled = gradients(PLAN.model_copy(update={"compiled": "blocks"}))
    assert none == 0 and num_compiled == len(find_blocks(MODEL)) > 0
    assert plain.keys() == compiled.keys() and plain_buffers.keys() == buffers.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)
    for name, buffer in plain_buffers.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)


def test_a_block_with_a_policy_is_not_compiled() -> None:
    paths = list(find_blocks(MODEL))
    plan = PLAN.model_copy(update={"compiled": "blocks", "blocks": {paths[0]: BlockPolicy(recompute="full")}})
    handle = apply_compilation(MODEL, plan, backend="eager")
    assert len(handle.blocks) == len(paths) - 1 and MODEL.get_submodule(paths[0]) not in handle.blocks
    handle.remove()


def test_evaluation_runs_blocks_as_they_are() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    model = initialised_model(RECIPE.model, 10, 0)[0].eval()
    plan = PLAN.model_copy(update={"compiled": "blocks"})
    handle = apply_compilation(model, plan, backend=backend)  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.zeros(2, 3, 64, 64))
    assert not calls
    model.train()(torch.zeros(2, 3, 64, 64))
    assert calls
    handle.remove()


def test_the_fastest_way_that_fits_is_taken_and_all_are_told_of() -> None:
    own, quick = Trial("none", 1.0, 100), Trial("blocks", 0.8, 120)
    failed = Trial("graphs", failure="does not fit")
    chosen = fastest(PLAN, [own, quick, failed])
    assert chosen.compiled == "blocks" and chosen.exactness == "rounding"
    assert "-20.0 %" in chosen.reasons[-1].replace("%", " %") and "does not fit" in chosen.reasons[-1]
    slower = fastest(PLAN, [own, Trial("blocks", 0.99, 100), failed])
    assert slower.compiled == "none" and slower.exactness == "bitwise"
    alone = fastest(PLAN, [own])
    assert alone.compiled == "none" and "random masks" in alone.reasons[-1]
    on_card = PLAN.model_copy(update={"device": "cuda:0"})
    assert keep_kernels(on_card, chosen).compiled == "blocks" and keep_kernels(on_card, slower) == on_card
    assert keep_kernels(PLAN, chosen) == PLAN, "on a CPU nothing runs compiled"


def test_trials_take_real_steps_and_survive_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module, plan: Plan) -> object:
        if plan.compiled == "graphs":
            raise RuntimeError("no triton here\nmore")
        return apply_compilation(model, plan.model_copy(update={"compiled": "none"}))

    monkeypatch.setattr("lowmem.training.engine.apply_compilation", broken)
    own, blocks, graphs = trial.try_execution(MODEL, RECIPE, PLAN, 10, ("none", "blocks", "graphs"))
    assert 0 < own.step_s < float("inf") and own.peak_bytes > 0 and blocks.step_s < float("inf")
    assert graphs.failure == "not available (no triton here)" and graphs.step_s == float("inf")
    assert all(parameter.grad is None for parameter in MODEL.parameters())


def test_networks_that_compiled_code_would_change_are_left_alone() -> None:
    split = RECIPE.model_copy(update={"batch": RECIPE.batch.model_copy(update={"size": 4, "norm_batch": 2})})
    assert trial.ways_to_try(MODEL, RECIPE) == ("none", "blocks", "graphs")
    assert trial.ways_to_try(MODEL, split) == ("none",)
    assert trial.ways_to_try(torch.nn.Dropout(0.5), RECIPE) == ("none",)


@pytest.mark.parametrize(
    ("wish", "allow", "device"),
    [("all", "rounding", "cuda"), ("measured", "bitwise", "cuda"), ("measured", "rounding", "cpu")],
)
def test_what_cannot_be_is_refused(wish: str, allow: str, device: str) -> None:
    with pytest.raises(LowmemError, match="--compile"):
        refuse_compile(wish, allow, device)
    refuse_compile("none", allow, device)


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", ["blocks", "graphs"])
def test_compiled_steps_on_a_card(compiled: str) -> None:
    pytest.importorskip("triton")
    from lowmem.verification import verify

    plan = PLAN.model_copy(update={"device": "cuda:0", "compiled": compiled, "exactness": "rounding"})
    found = verify(RECIPE, plan, 10, batches=random_batches(RECIPE, 10, 4))
    assert found.holds and found.num_differing
