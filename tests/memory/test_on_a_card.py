"""Engine, streams, allocator: what only a card can show. Each test that a CPU can run runs there too, to show that it is sound."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from memory_helpers import differing, end_state, make_engine, make_plan, make_recipe, policies, run_steps, state_of

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.memory.offload import HostStore, Ticket
from lowmem.planning.plan import Budget, Placement
from lowmem.recipe import MixupRecipe
from lowmem.training.engine import Engine, OutOfBudgetError

KINDS = ("full", "dropped", "offload", "selective_offload")
SLEEP_CYCLES = 20_000_000
"""About 10 ms on a card: longer than any step of the small models, so that a missing wait shows."""
NUM_REPETITIONS = 100

pytestmark = pytest.mark.usefixtures("deterministic", "whole_card")


@pytest.fixture
def num_repetitions(device: str) -> int:
    return NUM_REPETITIONS if device.startswith("cuda") else 2


@pytest.mark.parametrize(
    ("name", "amp"),
    [("test_resnet", "fp32"), *(pytest.param(n, a, marks=pytest.mark.cuda) for n in ("test_resnet", "test_efficientnet", "test_convnext", "test_vit") for a in ("fp32", "bf16", "fp16"))],
)  # fmt: skip
def test_policies_are_bitwise(device: str, name: str, amp: str) -> None:
    if amp != "fp32" and device == "cpu":
        pytest.skip("other tests do this on the CPU")
    recipe = make_recipe(name, dropout=0.2, drop_path=0.1)
    plan = make_plan(device=device, amp_dtype=amp)
    expected = end_state(recipe, plan, num_steps=3)
    assert not differing(expected, end_state(recipe, plan, num_steps=3)), "the reference itself is not reproducible"
    for kind in KINDS:
        found = end_state(recipe, plan.model_copy(update={"blocks": policies(name, kind)}), num_steps=3)
        assert not differing(expected, found), kind


@pytest.mark.parametrize("kind", ["offload", "selective_offload"])
def test_offload_is_bitwise_when_its_stream_lags(
    device: str, kind: str, num_repetitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy begins late, so that a buffer which is used or reused without waiting for it would be noticed."""
    recipe, plan = make_recipe("test_resnet", size=8, px=64), make_plan(device=device, micro_batch=8)
    expected = end_state(recipe, plan, num_steps=3)
    _slow_down(monkeypatch)
    lagging = plan.model_copy(update={"blocks": policies("test_resnet", kind)})
    for _ in range(num_repetitions):
        assert not differing(expected, end_state(recipe, lagging, num_steps=3))


@pytest.mark.cuda
def test_a_fetch_that_nobody_waits_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    recipe, plan = make_recipe("test_resnet", size=8, px=64), make_plan(device="cuda:0", micro_batch=8)
    expected = end_state(recipe, plan, num_steps=3)
    _slow_down(monkeypatch)
    get = HostStore.get

    def hasty(self: HostStore, ticket: Ticket) -> torch.Tensor:
        self.fetch_ahead(ticket.group)
        ticket.fetched = None
        return get(self, ticket)

    monkeypatch.setattr(HostStore, "get", hasty)
    lagging = plan.model_copy(update={"blocks": policies("test_resnet", "offload")})
    assert differing(expected, end_state(recipe, lagging, num_steps=3))


@pytest.mark.parametrize("placement", [p for p in get_args(Placement) if p != "device"])
def test_placements_are_bitwise_when_their_stream_lags(
    device: str, placement: str, num_repetitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.memory.host_optimizer.STAGING_BYTES", 200 * 1024)
    monkeypatch.setattr("lowmem.memory.host_optimizer.CHUNK_ELEMENTS", 25 * 1024)
    recipe, plan = make_recipe("test_resnet"), make_plan(device=device)
    expected = end_state(recipe, plan, num_steps=3)
    _slow_down(monkeypatch)
    for _ in range(num_repetitions // 2):
        assert not differing(expected, end_state(recipe, plan.model_copy(update={"optimizer": placement}), num_steps=3))


@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("kind", ["none", "full", "selective_offload"])
def test_the_host_never_waits_in_a_step(device: str, amp: str, placement: str, kind: str) -> None:
    """torch itself raises where an operation makes the host wait for the device."""
    if device == "cpu" and (amp, kind) != ("fp32", "selective_offload"):
        pytest.skip("one kind of arithmetic shows that the test is sound")
    if amp == "fp16" and placement.endswith("backward"):
        pytest.skip("a scaler needs all gradients at once")
    recipe = make_recipe("test_resnet", norm_batch=2).model_copy(update={"mixup": MixupRecipe(prob=1.0)})
    plan = make_plan(
        device=device, amp_dtype=amp, micro_batch=2, optimizer=placement, blocks=policies("test_resnet", kind)
    )
    engine = make_engine(recipe, plan)
    batches, device_input = _pinned_batches(engine), _input(engine)
    try:
        for step in range(4):
            with _no_waiting(device) if step >= 2 else _waiting():
                engine.train_step(batches[step], device_input, 1, step, 1e-3)
    finally:
        engine.close()


@pytest.mark.cuda
def test_waiting_is_noticed() -> None:
    """The negative control of the test above."""
    with _no_waiting("cuda:0"), pytest.raises(RuntimeError):
        float(torch.ones((), device="cuda"))


@pytest.mark.cuda
def test_no_pinned_memory_is_allocated_after_the_first_steps() -> None:
    plan = make_plan(device="cuda:0", blocks=policies("test_resnet", "offload"), optimizer="host")
    engine = make_engine(make_recipe("test_resnet"), plan)
    batches, device_input = _pinned_batches(engine), _input(engine)
    counts = []
    for step in range(4):
        engine.train_step(batches[step], device_input, 1, step, 1e-3)
        torch.cuda.synchronize()
        counts.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    engine.close()
    assert counts[1] == counts[3]


@pytest.mark.cuda
def test_reserved_memory_does_not_grow_from_step_to_step() -> None:
    engine = make_engine(
        make_recipe("test_resnet", size=16, px=96),
        make_plan(device="cuda:0", micro_batch=16, blocks=policies("test_resnet", "selective_offload")),
    )
    reserved = []
    for _ in range(6):
        run_steps(engine, [0, 1])
        reserved.append(torch.cuda.memory_reserved())
    engine.close()
    assert reserved[2] == reserved[-1]


def test_after_a_real_out_of_memory_a_leaner_plan_ends_where_the_rich_one_would_have(device: str) -> None:
    """The limit is the allocator's on a card, a count on the CPU; neither is told where to strike."""
    recipe = make_recipe("test_resnet", size=16, px=160, dropout=0.2)
    plan = make_plan(device=device, micro_batch=16)
    expected, peaks = {}, {}
    for kind in ("none", "full"):
        engine = make_engine(recipe, plan.model_copy(update={"blocks": policies("test_resnet", kind)}))
        run_steps(engine, range(3))
        expected[kind], peaks[kind] = state_of(engine), _peak_bytes(engine)
        engine.close()
    assert not differing(expected["none"], expected["full"]) and peaks["full"] < 0.95 * peaks["none"]
    budget = Budget(total_bytes=(peaks["full"] + peaks["none"]) // 2)
    engine = make_engine(recipe, plan.model_copy(update={"budget": budget}))
    with pytest.raises(OutOfBudgetError) as caught:
        run_steps(engine, [0])
    assert caught.value.rolled_back
    engine.adopt(plan.model_copy(update={"budget": budget, "blocks": policies("test_resnet", "full")}))
    run_steps(engine, range(3))
    assert not differing(expected["none"], state_of(engine))
    assert _peak_bytes(engine) <= budget.total_bytes
    engine.close()


@pytest.mark.cuda
def test_segments_are_expandable_in_a_fresh_process() -> None:
    code = (
        "import torch; from lowmem.memory.housekeeping import prepare_allocator; prepare_allocator(); torch.ones(1, device='cuda');"
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sys.platform != "win32")


def _peak_bytes(engine: Engine) -> int:
    """What a limit would have to leave: the allocator counts in segments on a card, by tensors on the CPU."""
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_reserved(engine.device)
    return engine.enforcement.peak_bytes


def _slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy that is meant to run beside the main stream begins late."""
    stream = torch.cuda.stream

    @contextmanager
    def lagging(side: Any) -> Iterator[None]:
        with stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            yield

    monkeypatch.setattr(torch.cuda, "stream", lagging)


@contextmanager
def _no_waiting(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _waiting() -> Iterator[None]:
    yield


def _input(engine: Engine) -> DeviceInput:
    norm = Normalisation((0.5,) * 3, (0.5,) * 3)
    return DeviceInput(norm, engine.device, engine.plan.memory_format, engine.recipe.mixup, engine.recipe.seed)


def _pinned_batches(engine: Engine) -> list[HostBatch]:
    """As a loader gives them."""
    batches = random_batches(engine.recipe, 3, 4)
    if engine.device.type == "cpu":
        return batches
    return [HostBatch(b.images_BHWC.pin_memory(), b.labels_B.pin_memory(), b.indices_B) for b in batches]
