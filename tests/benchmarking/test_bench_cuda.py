"""A bench on a card; its visits are processes of their own."""

import pytest
from rich.console import Console

from lowmem.benchmarking.command import BenchRequest, run_bench
from lowmem.benchmarking.result import load_bench
from lowmem.sizes import GIB

pytestmark = pytest.mark.cuda
SMALL = ("model.name=resnet18", "model.weights=none", "data.train_px=128", "batch.size=64")


def test_budgets_on_a_card_hold_and_have_memory_and_energy(tmp_path):
    path = tmp_path / "bench.json"
    request = BenchRequest(budgets="4G,2G,1000G", devices="cuda:0", overrides=SMALL, minutes=0, out=path)
    assert run_bench(request, Console(quiet=True)) == 0
    refused, *measured = load_bench(path).rows
    assert refused.outcome == "refused" and "has" in refused.reason
    for row in measured:
        assert row.outcome == "measured", row.reason
        assert 0 < row.memory.peak_bytes <= row.memory.reserved_bytes <= row.budget_bytes
        joules = row.joules_per_image(64)
        assert joules is None or 0 < joules < 100
    assert measured[-1].budget_bytes == 2 * GIB
