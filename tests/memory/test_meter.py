"""The meter against bytes counted by hand."""

import pytest
import torch

from lowmem.memory.meter import MemoryMeter, host_memory

KB = 1024


def test_tensors_are_counted_while_they_live() -> None:
    with MemoryMeter() as meter:
        a = torch.empty(256)
        assert meter.live_bytes == KB
        b = a + 1
        view = b.view(16, 16)[2:]
        assert meter.live_bytes == 2 * KB
        b.add_(1)
        del b
        assert meter.live_bytes == 2 * KB  # the view holds it
        del view
        assert meter.live_bytes == KB
        del a
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 2 * KB


def test_forward_and_backward_of_a_product() -> None:
    weight_KK = torch.ones(16, 16, requires_grad=True)
    x_BK = torch.ones(32, 16)
    with MemoryMeter() as meter:
        meter.adopt([weight_KK, x_BK], "resident")
        assert meter.live_bytes == KB + 2 * KB
        y = (x_BK @ weight_KK).relu()  # the product is 2 KiB and dies, relu's 2 KiB is saved
        assert (meter.live_bytes, meter.peak_bytes) == (5 * KB, 7 * KB)
        loss = y.sum()
        del y
        assert meter.live_bytes == 5 * KB + 4
        loss.backward()
        del loss
        assert meter.live_bytes == 4 * KB  # the gradient is left
        weight_KK.grad = None
        assert meter.live_bytes == 3 * KB


def test_host_memory_is_not_counted() -> None:
    with MemoryMeter() as meter:
        with host_memory():
            a = torch.empty(1000)
        a.add_(1)
        assert meter.live_bytes == 0
        b = a + 1
        assert meter.live_bytes == 4000
        del a, b
        assert meter.live_bytes == 0


def test_the_limit_is_exact() -> None:
    with MemoryMeter(limit_bytes=2 * KB) as meter:
        a = torch.empty(512)
        del a
        a = torch.empty(256)
        b = torch.empty(256)
        with pytest.raises(torch.OutOfMemoryError, match=r"1\.00 KiB; 2\.00 KiB of 2\.00 KiB"):
            torch.empty(256)
        assert meter.live_bytes == 2 * KB
        del a, b


def test_lists_and_adopted_storages_count_once() -> None:
    x = torch.empty(256)
    with MemoryMeter() as meter:
        meter.adopt([x, x.view(16, 16), x[:3]], "resident")
        assert meter.live_bytes == KB
        parts = torch._foreach_add([x, x], 1)
        assert meter.live_bytes == 3 * KB
        del parts
        meter.reset_peak()
        assert meter.peak_bytes == KB


def test_the_timeline_knows_the_peak_and_who_was_there() -> None:
    with MemoryMeter(record=True) as meter:
        meter.label = "first"
        a = torch.empty(256)
        meter.label = "second"
        b = torch.empty(512)
        del b
        meter.label = "third"
        c = torch.empty(128)
        del a, c
    assert meter.timeline is not None
    at_peak = meter.timeline.live_at(meter.timeline.peak_time())
    assert {(item.label, item.num_bytes) for item in at_peak} == {("first", KB), ("second", 2 * KB)}
    assert sum(item.num_bytes for item in at_peak) == meter.peak_bytes
    assert all(item.died is not None for item in meter.timeline.allocations)


def test_a_meter_may_die_before_what_it_counted() -> None:
    with MemoryMeter() as meter:
        x = torch.empty(256)
    del meter
    del x
